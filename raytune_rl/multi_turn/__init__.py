"""Conversations of several turns in online RL: what a scheduler is, and which there are."""
