"""Data sets that are known by their id, with the subsets, splits and preparation that ms-swift gives them.

An entry is found by either hub's id on either hub; a local copy by the name of its folder. Source: the
registry of ms-swift 4 (`swift/dataset`), whose subset names are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from raytune_rl.data import registered_rules as rules
from raytune_rl.data.rules import Rule, asked, filled, renamed


@dataclass(frozen=True)
class Subset:
    """A subset as users name it.

    Attributes:
        name: Its name.
        hub: Its name on the hub, where that is another.
        splits: Read when the user names none; empty: the entry's.
        rule: How its rows are prepared; None: as the entry says.
        weak: Whether it is left out of `:all`.
        whole: Whether it is the whole of a data set without such a subset.
    """

    name: str
    hub: str | None = None
    splits: tuple[str, ...] = ()
    rule: Rule | None = None
    weak: bool = False
    whole: bool = False

    @property
    def on_hub(self) -> str | None:
        return None if self.whole else self.hub or self.name


@dataclass(frozen=True)
class Entry:
    """One data set.

    Attributes:
        ids: Its ids, that on ModelScope first.
        subsets: The subsets there are to name; `default`, or the only one, is read when none is named. Empty:
            what the hub says.
        splits: Read when the user names none; empty: what is for training.
        rule: How rows are prepared.
    """

    ids: tuple[str, ...]
    subsets: tuple[Subset, ...] = ()
    splits: tuple[str, ...] = ()
    rule: Rule | None = None


def _entry(
    ids: str, subsets: str | tuple[Subset, ...] = (), splits: str = "", rule: Rule | None = None
) -> Entry:
    named = tuple(Subset(name) for name in subsets.split()) if isinstance(subsets, str) else subsets
    return Entry(tuple(ids.split()), named, tuple(splits.split()), rule)


def entry_of(name: str) -> Entry | None:
    """The entry of an id (`owner/name`), or of the name of a local folder alone; None if there is none."""
    return _BY_NAME.get(name)


_PAIRS = {"chosen": "response", "rejected": "rejected_response"}
_ADVERTISE = filled(
    "rows are keywords to be made an advertisement",
    ("content", "summary"),
    "Task: Generating advertisements based on keywords.\nKeywords: {content}\nAdvertisements:",
    "{summary}",
)
_TEXT_TO_SQL = filled(
    "tables and explanation are part of question and answer",
    ("sql_prompt", "sql_context", "sql", "sql_explanation"),
    "Sql Table information:\n{sql_context}\n{sql_prompt}",
    "Let's think step by step:\n{sql_explanation}\nSo the final sql is:\n{sql}",
)
_BLOSSOM = filled(
    "the short answer stands after the long one",
    ("input", "output", "answer"),
    "{input}",
    "{output}\n\nAnswer: {answer}",
)
_MEDICAL = (
    Subset("en", rule=renamed({"input": "query", "output": "response"})),
    Subset("zh", rule=renamed({"instruction": "query", "output": "response"})),
)
_XLAM = (Subset("default", "dataset", rule=rules.XLAM), Subset("grpo", "dataset", rule=rules.XLAM_GRPO))
_R1_DISTILL = (
    Subset("v0", rule=renamed({"problem": "query", "reannotated_assistant_content": "response"})),
    Subset("v1", rule=renamed({"messages": "", "reannotated_messages": "messages"})),
)
_SELF_COGNITION = (
    Subset("default", rule=rules.SELF_COGNITION),
    Subset("qwen3", "default", rule=rules.SELF_COGNITION_QWEN3),
    Subset("empty_think", "default", rule=rules.SELF_COGNITION_EMPTY_THINK),
)
_COCO = tuple(Subset(name, "coco_2014_caption", (name,)) for name in ("train", "validation"))
_SPLITS_AS_SUBSETS = tuple(Subset(name, "default", (name,)) for name in ("train", "validation", "test"))

ENTRIES: tuple[Entry, ...] = (
    # the documents' own
    _entry("AI-ModelScope/alpaca-gpt4-data-zh llm-wizard/alpaca-gpt4-data-zh", rule=rules.ALPACA_ZH),
    _entry("AI-ModelScope/alpaca-gpt4-data-en vicgalle/alpaca-gpt4"),
    _entry(
        "AI-ModelScope/LaTeX_OCR linxy/LaTeX_OCR",
        "default human_handwrite human_handwrite_print synthetic_handwrite small",
        "train validation test",
        asked("Using LaTeX to perform OCR on the image."),
    ),
    _entry("AI-MO/NuminaMath-TIR"),
    _entry("AI-MO/NuminaMath-CoT"),
    _entry("lmms-lab/multimodal-open-r1-8k-verified"),
    _entry("swift/self-cognition modelscope/self-cognition", _SELF_COGNITION),
    # conversation and instruction
    _entry("AI-ModelScope/LongAlpaca-12k Yukang/LongAlpaca-12k", rule=rules.LONG_ALPACA),
    _entry("AI-ModelScope/databricks-dolly-15k databricks/databricks-dolly-15k", rule=rules.DOLLY),
    _entry("AI-ModelScope/firefly-train-1.1M YeungNLP/firefly-train-1.1M", rule=rules.FIREFLY),
    _entry("AI-ModelScope/GuanacoDataset JosephusCheung/GuanacoDataset", rule=rules.GUANACO),
    _entry("iic/ms_bench", rule=rules.MS_BENCH),
    _entry("swift/ultrachat_200k HuggingFaceH4/ultrachat_200k", splits="train_sft"),
    _entry("swift/sharegpt", "common-zh unknow-zh common-en"),
    _entry("AI-ModelScope/sharegpt_gpt4", "default V3_format zh_38K_format"),
    _entry("AI-ModelScope/deepctrl-sft-data", "default en"),
    _entry("swift/swift-sft-mixture", "sharegpt firefly codefuse metamathqa"),
    _entry("damo/nlp_polylm_multialpaca_sft", "ar de es fr id ja ko pt ru th vi"),
    _entry("wyj123456/instinwild", "default subset"),
    _entry("AI-ModelScope/OpenOrca", "default 3_5M", rule=renamed({"question": "query"})),
    _entry(
        "AI-ModelScope/COIG-CQIA",
        "chinese_traditional coig_pc exam finance douban human_value logi_qa ruozhiba segmentfault wiki "
        "wikihow xhs zhihu",
    ),
    _entry(
        "swift/Infinity-Instruct BAAI/Infinity-Instruct",
        "3M 7M 0625 Gen 7M_domains",
        rule=renamed({"label": ""}),
    ),
    _entry(
        "swift/GenQA tomg-group-umd/GenQA",
        splits="code dialog general math mmlu multiple_choice writing academic task",
        rule=renamed({"text": "messages"}),
    ),
    _entry(
        "swift/aya_collection CohereForAI/aya_collection",
        "aya_dataset",
        rule=renamed({"inputs": "query", "targets": "response"}),
    ),
    _entry(
        "AI-ModelScope/Duet-v0.5 G-reen/Duet-v0.5",
        rule=renamed({"rewritten_question": "query", "rewritten_answer": "response"}),
    ),
    _entry(
        "AI-ModelScope/lawyer_llama_data Skepsun/lawyer_llama_data",
        rule=renamed({"instruction": "query", "output": "response", "history": ""}),
    ),
    _entry("swift/medical_zh", _MEDICAL, "train val test"),
    _entry("FreedomIntelligence/medical-o1-reasoning-SFT", "en zh"),
    _entry("ServiceNow-AI/R1-Distill-SFT", _R1_DISTILL),
    _entry("lvjianjin/AdvertiseGen shibing624/AdvertiseGen", splits="train validation", rule=_ADVERTISE),
    # tools and agents
    _entry("LLM-Research/xlam-function-calling-60k Salesforce/xlam-function-calling-60k", _XLAM),
    _entry("AI-ModelScope/ms_agent_for_agentfabric", "default addition"),
    _entry("huangjintao/AgentInstruct_copy", "alfworld db kg mind2web os webshop"),
    _entry("shenweizhou/alpha-umi-toolbench-processed-v2", "backbone caller planner summarizer"),
    # code
    _entry("AI-ModelScope/sql-create-context b-mc2/sql-create-context", rule=rules.SQL_CONTEXT),
    _entry("AI-ModelScope/synthetic_text_to_sql gretelai/synthetic_text_to_sql", rule=_TEXT_TO_SQL),
    _entry("codefuse-ai/CodeExercise-Python-27k", rule=renamed({"chat_rounds": "messages"})),
    _entry("AI-ModelScope/leetcode-solutions-python", rule=rules.LEETCODE),
    _entry("open-r1/verifiable-coding-problems-python", rule=renamed({"problem_statement": "query"})),
    _entry(
        "open-r1/verifiable-coding-problems-python_decontaminated",
        rule=renamed({"problem_statement": "query"}),
    ),
    # mathematics
    _entry("modelscope/gsm8k openai/gsm8k gsm8k", "main"),
    _entry("modelscope/MathR", "default clean"),
    _entry("modelscope/MathR-32B-Distill", "data"),
    _entry("TIGER-Lab/MATH-plus", "train"),
    _entry("tastelikefeet/competition_math", splits="train test"),
    _entry("open-r1/DAPO-Math-17k-Processed", "all"),
    _entry(
        "AI-ModelScope/MATH-lighteval DigitalLearningGmbH/MATH-lighteval", rule=renamed({"problem": "query"})
    ),
    _entry("AI-ModelScope/blossom-math-v2 Azure99/blossom-math-v2", rule=_BLOSSOM),
    _entry("zouxuhong/Countdown-Tasks-3to4 Jiayi-Pan/Countdown-Tasks-3to4", rule=rules.COUNTDOWN),
    _entry("sapientinc/sudoku-extreme-1k", rule=rules.SUDOKU),
    # preferences
    _entry("AI-ModelScope/hh-rlhf", "helpful-base helpful-online helpful-rejection-sampled", "train test"),
    _entry("swift/orca_dpo_pairs Intel/orca_dpo_pairs", rule=renamed({"question": "query"} | _PAIRS)),
    _entry("AI-ModelScope/zhihu_rlhf_3k liyucheng/zhihu_rlhf_3k", rule=renamed({"prompt": "query"} | _PAIRS)),
    _entry("HumanLLMs/Human-Like-DPO-Dataset", rule=renamed({"prompt": "query"} | _PAIRS)),
    _entry("swift/RLAIF-V-Dataset openbmb/RLAIF-V-Dataset", rule=renamed({"question": "query"} | _PAIRS)),
    _entry("AI-ModelScope/orpo-dpo-mix-40k mlabonne/orpo-dpo-mix-40k", rule=rules.NOT_TOXIC),
    _entry(
        "hjh0119/shareAI-Llama3-DPO-zh-en-emoji shareAI/DPO-zh-en-emoji",
        rule=renamed({"question": "query", "answer_zh": "response", "answer_en": "rejected_response"}),
    ),
    _entry(
        "AI-ModelScope/stack-exchange-paired lvwerra/stack-exchange-paired",
        rule=renamed({"question": "query", "response_j": "response", "response_k": "rejected_response"}),
    ),
    _entry("iic/DocQA-RL-1.6K Tongyi-Zhiwen/DocQA-RL-1.6K", rule=renamed({"prompt": "messages"})),
    # pictures, videos, sound
    _entry("modelscope/coco_2014_caption", _COCO, rule=asked("please describe the image.", "caption")),
    _entry("swift/ChartQA HuggingFaceM4/ChartQA", rule=renamed({"label": "response"})),
    _entry(
        "swift/VQAv2 HuggingFaceM4/VQAv2",
        rule=renamed({"question": "query", "multiple_choice_answer": "response", "answers": ""}),
    ),
    _entry(
        "swift/cinepile tomg-group-umd/cinepile",
        rule=renamed({"yt_clip_link": "videos", "question": "query", "answer_key": "response"}),
    ),
    _entry(
        "swift/gpt4v-dataset laion/gpt4v-dataset",
        rule=asked("What is the caption of this image?", "caption", "link"),
    ),
    _entry(
        "swift/TextCaps HuggingFaceM4/TextCaps",
        splits="train validation",
        rule=asked("What is the caption of this image?", "reference_strs"),
    ),
    _entry(
        "AI-ModelScope/captcha-images",
        splits="train validation",
        rule=asked("recognize the content.", "solution"),
    ),
    _entry(
        "swift/A-OKVQA HuggingFaceM4/A-OKVQA",
        splits="train validation",
        rule=renamed({"rationales": "response"}),
    ),
    _entry("swift/OCR-VQA howard-hou/OCR-VQA", splits="train validation", rule=rules.ONE_QUESTION),
    _entry("swift/ScienceQA derek-thomas/ScienceQA", splits="train validation", rule=rules.SCIENCE_QA),
    _entry("swift/llava-instruct-mix-vsft HuggingFaceH4/llava-instruct-mix-vsft", splits="test"),
    _entry("swift/MideficsDataset WinterSchool/MideficsDataset", rule=rules.CONVERSATION_DATA),
    _entry("AI-ModelScope/clevr_cogen_a_train leonardPKU/clevr_cogen_a_train", rule=rules.CLEVR),
    _entry("hiyouga/geometry3k", _SPLITS_AS_SUBSETS, rule=rules.GEOMETRY),
    _entry(
        "AI-ModelScope/M3IT",
        rule=renamed(
            {"instruction": "system", "inputs": "query", "image_base64_str": "images", "outputs": "response"}
        ),
    ),
    # not in ms-swift's registry
    _entry("HuggingFaceM4/the_cauldron AI-ModelScope/the_cauldron", rule=rules.CAULDRON),
)


def _names() -> Iterator[tuple[str, Entry]]:
    for entry in ENTRIES:
        for name in entry.ids:
            yield name.rpartition("/")[2], entry
            yield name, entry


_BY_NAME: Mapping[str, Entry] = dict(_names())
