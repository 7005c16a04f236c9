"""RULER (Hsieh et al. 2024, arXiv 2404.06654), version 1: samples, as its published generator makes them, and scores.

    published    the 13 tasks with their settings, and `samples`, which makes the samples of one
    lengths      how many tokens a text has, without encoding the same words again
    fitting      how much of a haystack fits a length; always ends
    needles      niah_*: needles in noise, in other needles, in essays
    tracking     vt: chains of variable assignments
    frequent     cwe and fwe: which words occur most often
    questions    qa_1 and qa_2: questions about documents among other documents
    vocabulary   the words from which keys and lists are made
    scores       string matches, averages, effective length

With the same tokenizer, length and seed the samples are those of the scripts in scripts/data/synthetic of
github.com/NVIDIA/RULER (branch main before its deprecation in 2026, now rulerv1-ns), text for text, because every draw
of random numbers happens in the same order. The differences are where the scripts fail:

- They retry for ever where a sample cannot become short enough. Here the haystack shrinks to the smallest one, and if
  that does not fit either, an error says which length would.
- The script of fwe does not reserve room for the generated tokens. Here a text that leaves none is made shorter.
- cwe needs more words than there are from about 128K tokens on. Without the file english_words.json of the original it
  goes on with pairs of words; a note says so.
- Essays are split into sentences by a rule of our own instead of NLTK's punkt model, which must be downloaded; and the
  essays are the user's. Scores of these tasks are therefore those of a custom haystack.
"""
