"""Rewards: pictures, their prompts and what is known of them -> scores."""
