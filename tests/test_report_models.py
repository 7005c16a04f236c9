"""A report says of how many models its results are: two commands about one model are not two models."""

from lcx.reporting.opening import paragraphs
from lcx.reporting.runs import labelled


def run(evaluation, *, weights="f00", definition="d"):
    """Results as lcx.evaluate writes them."""
    result = {"summary": f"{evaluation} of {weights}", "definition": definition}
    return {
        "name": "mine",
        "weights": weights,
        "checkpoint": "runs/mine",
        "model": {"description": {"layers": 2}},
        "evaluations": {evaluation: result},
        "seconds": 2,
    }


def said(*runs):
    return " ".join(paragraphs(labelled(runs), {}))


def test_different_evaluations_of_one_model_are_one_run():
    (one,) = labelled([run("recall"), run("cost")]).values()
    assert list(one["evaluations"]) == ["recall", "cost"] and one["seconds"] == 4
    assert said(run("recall"), run("cost")).startswith("“mine” is evaluated by recall and cost: recall of f00.")


def test_one_evaluation_again_is_no_other_model():
    text = said(run("recall"), run("recall", definition="another text"), run("cost"))
    assert text.startswith("“mine” is evaluated 2 times by recall and cost: “mine”: recall of f00; “mine (2)”: recall")
    assert "alone" not in text and "Recall was not measured in the same way every time" in text


def test_other_weights_are_another_model():
    assert said(run("recall"), run("recall", weights="f01")).startswith("2 models are compared by recall: ")
    assert "2 models are compared in 3 results" in said(run("cost"), run("cost"), run("cost", weights="f01"))
    old = [{key: value for key, value in run("cost").items() if key != "weights"} for _ in range(2)]
    assert said(*old).startswith("2 models are compared")  # results of older versions do not say
