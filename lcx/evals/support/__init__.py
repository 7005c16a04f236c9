"""Components shared by evaluations: reading text and sequences, scoring them, confidence intervals, plots."""
