"""The interactions that data are built of, and their shares by default."""

MIX: dict[str, float] = {
    "basic": 0.20,
    "interweave": 0.06,
    "termination": 0.14,
    "regeneration": 0.08,
    "reset": 0.06,
    "back_on_topic": 0.07,
    "pause": 0.12,
    "backchannel": 0.09,
    "noise": 0.09,
    "late_answer": 0.05,
    "late_correction": 0.04,
}
"""The first six are of arXiv 2406.15718; what each is, its function in `interactions` says."""
