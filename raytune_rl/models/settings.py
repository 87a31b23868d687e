"""Settings of the tuner, under the name that users of `models` know: the value itself lives in `protocol`."""

from raytune_rl.protocol.model import TunerSettings as TunerSettings
