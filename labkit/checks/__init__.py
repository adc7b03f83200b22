"""What the notebooks' exercises are checked with: one file a notebook, and `check.py`, the machinery that they share.

    from labkit.checks import noising
    noising.q_sample(q_sample)      # "Correct: ...", or which mistake it is

A check never raises and never prints: it returns a `Verdict` that the notebook shows, so that Run All always reaches the end.
"""
