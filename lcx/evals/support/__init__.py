"""What several evaluations share: text and sequences to score, the scores themselves, intervals, plots."""
