"""Questions about long documents: files in published layouts, cuts in the middle, published scores.

rows        lines of LongBench v1, LongBench v2, GovReport and plain questions, each as a `Row`
task        a prompt, the tokens of an answer, and the name of its score
longbench   the tasks of LongBench v1; those in Chinese, and how their texts are cut into words, are in `chinese`
scores      F1, exact match, contains, classification, retrieval, count, code similarity, ROUGE, also of Chinese
"""
