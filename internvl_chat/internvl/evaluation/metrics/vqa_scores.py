"""Score of short answers with several annotators: vqa_accuracy.

Source: Antol et al. 2015, VQA; the normalization is that of the TextVQA evaluator that InternVL uses.
"""

import re

from internvl.evaluation.metrics.number_scores import CARDINALS

MARKS = ';/[]"{}()=+\\_-><@`!'
NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(CARDINALS)}
ARTICLES = {"a", "an", "the"}
NUM_AGREEING = 3  # other annotators that make an answer right
MIN_ANNOTATORS = 4  # with fewer, leaving one out would make a perfect answer wrong

# Words without their apostrophe. It goes before the first of these endings that fits.
ENDINGS = {"nt": "n't", "ve": "'ve", "ll": "'ll", "re": "'re", "d": "'d", "s": "'s"}
PLAIN_CONTRACTIONS = """
    aint arent cant couldve couldnt didnt doesnt dont hadnt hasnt havent hed hes howd howll hows isnt itd itll mightnt
    mightve mustnt mustve neednt notve oughtnt shant shouldve shouldnt somebodyll somebodys someoned someonell someones
    somethingd somethingll thats thered therere theres theyd theyll theyre theyve wasnt weve werent whatll whatre whats
    whatve whens whered wheres whereve whod wholl whos whove whyll whyre whys wont wouldve wouldnt youd youll youre
    youve
""".split()


def _list_contractions() -> dict[str, str]:
    table = {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all", "'ows'at": "'ow's'at"}
    for word in PLAIN_CONTRACTIONS:
        ending = next(ending for ending in ENDINGS if word.endswith(ending))
        table[word] = word.removesuffix(ending) + ENDINGS[ending]
    for stem in "could had might should would".split():
        table |= dict.fromkeys((f"{stem}nt've", f"{stem}n'tve"), f"{stem}n't've")
    for stem in "he it she somebody someone something there they we who you".split():
        table |= dict.fromkeys((f"{stem}d've", f"{stem}'dve"), f"{stem}'d've")
    table |= dict.fromkeys(("yall'll", "y'allll"), "y'all'll")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    return table | {"somebody'd": "somebodyd"}  # as in the evaluator


CONTRACTIONS = _list_contractions()


def score_vqa_accuracy(record: dict) -> float:
    """Score an answer by the annotators that agree with it.

    Each annotator in turn is left out, and the answer is as right as min(1, agreeing others / 3). The score is the
    mean. With one to three references any of them is right.
    """
    prediction = normalize_answer(record["prediction"])
    references = [normalize_answer(reference) for reference in record["references"]]
    num_equal = references.count(prediction)
    if len(references) < MIN_ANNOTATORS:
        return float(num_equal > 0)
    others = (num_equal - (reference == prediction) for reference in references)
    return sum(min(1, number / NUM_AGREEING) for number in others) / len(references)


def normalize_answer(text: str) -> str:
    """Remove articles and punctuation, write numbers as digits and complete contractions."""
    text = re.sub("[,?]", "", text.lower()).replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    text = remove_punctuation(text, MARKS)
    text = re.sub(r"\.(?!\d)", "", text)
    words = (NUMBER_WORDS.get(word, word) for word in text.split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def remove_punctuation(text: str, marks: str) -> str:
    """Delete marks that stand beside a blank anywhere in the text, and put a blank for the others."""
    beside_blank = {mark for mark in marks if f"{mark} " in text or f" {mark}" in text}
    return text.translate({ord(mark): "" if mark in beside_blank else " " for mark in marks})
