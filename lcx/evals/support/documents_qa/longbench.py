"""The tasks of LongBench v1 (Bai et al. 2023, arXiv 2308.14508): prompts, lengths of answers, scores."""

from lcx.evals.support.documents_qa import chinese
from lcx.evals.support.documents_qa.task import Task

_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe"
    " following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the"
    " answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
)
_ARTICLE = (
    " as concisely as you can, using a single phrase or sentence if possible. If the question cannot"
    " be answered based on"
    ' the information in the article, write "unanswerable". If the question is a yes/no question,'
    ' answer "yes", "no", or'
    ' "unanswerable". Do not provide any explanation.'
)
_STORY = "asconcisely as you can, using a single phrase if possible. Do not provide any explanation."  # as published

TASKS = {
    "narrativeqa": Task(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question"
        f" {_STORY}\n\nStory: {{context}}\n\nNow, answer the question based on the story {_STORY}\n\nQuestion:"
        " {input}\n\nAnswer:",
        128,
        "f1",
    ),
    "qasper": Task(
        f"You are given a scientific article and a question. Answer the question{_ARTICLE}\n\nArticle: {{context}}\n\n"
        f" Answer the question based on the above article{_ARTICLE}\n\nQuestion: {{input}}\n\nAnswer:",
        128,
        "f1",
    ),
    "multifieldqa_en": Task(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the"
        " above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64,
        "f1",
    ),
    "hotpotqa": Task(_PASSAGES, 32, "f1"),
    "2wikimqa": Task(_PASSAGES, 32, "f1"),
    "musique": Task(_PASSAGES, 32, "f1"),
    "gov_report": Task(
        "You are given a report by a government agency. Write a one-page summary of the"
        " report.\n\nReport:\n{context}\n\n"
        "Now, write a one-page summary of the report.\n\nSummary:",
        512,
        "rouge_l",
    ),
    "qmsum": Task(
        "You are given a meeting transcript and a query containing a question or instruction. Answer"
        " the query in one or"
        " more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above"
        " meeting transcript in one"
        " or more sentences.\n\nQuery: {input}\nAnswer:",
        512,
        "rouge_l",
    ),
    "multi_news": Task(
        "You are given several news passages. Write a one-page summary of all news."
        " \n\nNews:\n{context}\n\nNow, write a"
        " one-page summary of all the news.\n\nSummary:",
        512,
        "rouge_l",
    ),
    "trec": Task(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64,
        "classification",
        first_line=True,
    ),
    "triviaqa": Task(
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. The"
        " following are some examples.\n\n{context}\n\n{input}",
        32,
        "f1",
        first_line=True,
    ),
    "samsum": Task(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128,
        "rouge_l",
        first_line=True,
    ),
    "passage_count": Task(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read"
        " these paragraphs and determine how many unique paragraphs there are after removing"
        " duplicates. In other words,"
        " how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique"
        " paragraphs after removing duplicates. The output format should only contain the number,"
        " such as 1, 2, 3, and so"
        " on.\n\nThe final answer is: ",
        32,
        "count",
    ),
    "passage_retrieval_en": Task(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which"
        " paragraph the abstract is"
        " from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number"
        " of the paragraph that"
        ' the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        32,
        "retrieval",
    ),
    "lcc": Task("Please complete the code given below. \n{context}Next line of code:\n", 64, "code"),
    "repobench-p": Task(
        "Please complete the code given below. \n{context}{input}Next line of code:\n", 64, "code"
    ),
    **chinese.TASKS,
}
V2_PROMPT = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\nWhat is the correct"
    ' answer to this question: {input}\n\nFormat your response as follows: "The correct answer is (insert answer'
    ' here)".'
)
