"""Questions about long documents: files in published layouts, cuts in the middle, published scores.

rows        lines of LongBench v1, LongBench v2, GovReport and plain questions, each as a `Row`
longbench   the prompts, answer lengths and scores of LongBench v1's English tasks
scores      F1, exact match, contains, classification, retrieval, count, code similarity, ROUGE
"""
