"""Makes the golden files in this folder. Needs Java, pycocoevalcap 1.2, jiwer 4.0, pytest, the official `vqaEval.py`.

    python tests/evaluation/metrics/golden/make_golden.py captions
    python tests/evaluation/metrics/golden/make_golden.py tokens dataset_flickr8k.json
    python tests/evaluation/metrics/golden/make_golden.py answers FOLDER_OF_vqaEval.py
    python tests/evaluation/metrics/golden/make_golden.py error_rates

The inputs come from the tests, so that a golden file holds little more than the output of the reference.
"""

import json
import runpy
import sys
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
TESTS = HERE.parent
sys.path.insert(0, str(TESTS.parent.parent.parent))


def write(name, **parts):
    rows = (f" {json.dumps(key)}: {json.dumps(part, ensure_ascii=False)}" for key, part in parts.items())
    (HERE / f"{name}.json").write_text("{\n" + ",\n".join(rows) + "\n}\n")


def make_captions():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    def scores(candidates, references):
        predicted = {index: [" ".join(words)] for index, words in enumerate(candidates)}
        expected = {}
        for index, targets in enumerate(references):
            expected[index] = [" ".join(words) for words in targets]
        values = [*Bleu().compute_score(expected, predicted, verbose=0)[0]]
        values += [metric().compute_score(expected, predicted)[0] for metric in (Rouge, Cider)]
        return [round(float(value), 9) for value in values]

    test = runpy.run_path(str(TESTS / "test_captions.py"))
    corpora = [test["corpus"](seed) for seed in range(test["CORPORA"])]
    everything = [sum((part[side] for part in corpora), []) for side in (0, 1)]
    write("captions", names=test["NAMES"], all=scores(*everything), scores=[scores(*part) for part in corpora])


def reference_lines(lines):
    """Stanford's lexer reads across line ends; a plain line after each sentence separates it from the next."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    spaced = [text for line in lines for text in (line, "so on")]
    tokens = PTBTokenizer().tokenize({index: [{"caption": text}] for index, text in enumerate(spaced)})
    return [tokens[2 * index][0] for index in range(len(lines))]


NOUNS = """dog boy man's woman girls' child's bike t-shirt tug-of-war bird's-eye snow-covered men's T-shirt ball JEEP
    3-year-old Spider-Man U-turn o'clock B&W AT&T mp3 4x4 TV T.V. U.S. D.C. café firefighter's friends' two-tone 2nd 12
    1,000 3.5 10:30 #7 $5 50% 1950's '80s 90's x-ray and/or 3/4 5-6 24/7 Mr. Dr. St. Jr. vs. etc. e.g. p.m. a.m. No. 5
    rock 'n' roll M&M's O'Brien 5th-grade red/white "Stop" (left) [blue] half-pipe dog-cat's Mt. K9 5k 100m 6'2" <unk>
    hip-hop hand-in-hand snowboarder cannon naïve-looking Ave. £5 N.Y.C. J. K."""
VERBS = """runs jumps is sits isn't doesn't can't won't they're he's it's she'll we've I'm you'd cannot gonna wanna looks
    ' s 'm n't should've didn't ain't who's that's there's let's 'em 'tis y'all could'nt ma'am don’t it’s"""
OTHERS = """a the A The an two some his her their red small black-and-white big grey 'little' "happy" one 3 very old"""
JOINTS = """, |,|; |: | - | -- |--| ... |... | / | & | (|) |. | . |! |? |"| "|" |' | '|" | “|” | ‘|’ | – |—"""
ENDS = """.| .||!|?|...|'."|".|'.|."| !| ?|,|!!|?!|.)|)"""


def sentence(rng):
    pools = [OTHERS.split(), NOUNS.split(), VERBS.split()] * (1 + int(4 * rng.random()))
    words = [rng.choice(pool) for pool in pools if rng.random() < 0.8] or ["dog"]
    text = (
        words[0]
        + "".join(rng.choice([" "] * 80 + JOINTS.split("|")) + word for word in words[1:])
        + rng.choice(ENDS.split("|"))
    )
    return text[:1].upper() + text[1:] if rng.random() < 0.5 else text


def make_tokens(flickr8k):
    test = runpy.run_path(str(TESTS / "test_ptb_tokenizer.py"))
    written = [
        line for line, _ in json.loads((HERE / "tokens.json").read_text())["written"]
    ]  # add new lines with any tokens
    rng = Random(2024)
    generated = list(dict.fromkeys(sentence(rng) for _ in range(1_100)))
    captions = test["flickr8k_captions"](flickr8k)
    write(
        "tokens",
        written=list(zip(written, reference_lines(written), strict=True)),
        generated=list(zip(generated, reference_lines(generated), strict=True)),
        flickr8k=test["digests"]([" ".join(line.split()) for line in reference_lines(captions)]),
    )


def make_answers(folder):
    sys.path.insert(0, folder)
    from vqaEval import VQAEval

    class Answers:
        """The part of the official data reader that the script uses."""

        def __init__(self, questions):
            self.qa = questions

        def getQuesIds(self):  # noqa: N802 (called by the script)
            return list(self.qa)

    test = runpy.run_path(str(TESTS / "test_answers.py"))
    questions = [test["question"](seed) for seed in range(test["QUESTIONS"])]
    predictions = {seed: {"answer": prediction} for seed, (prediction, _) in enumerate(questions)}
    annotations = {
        seed: {
            "answers": [{"answer": answer, "answer_id": index} for index, answer in enumerate(answers)],
            "question_type": "any",
            "answer_type": "any",
        }
        for seed, (_, answers) in enumerate(questions)
    }
    judge = VQAEval(Answers(annotations), Answers(predictions), n=2)
    exact = {}
    judge.updateProgress = lambda progress: None
    judge.setEvalQA = exact.__setitem__  # the script rounds to two decimals
    judge.evaluate()
    accuracy = [exact[seed] for seed in range(len(questions))]
    words = sorted({word.lower() for word in test["spellings"]()})
    repaired = {word: judge.processDigitArticle(word) for word in words}
    changed = {word: right for word, right in repaired.items() if word != right}
    write("answers", accuracy=accuracy, repaired=changed)


def make_error_rates():
    import jiwer

    test = runpy.run_path(str(TESTS / "test_edit_distance.py"))
    corpora = [test["corpus"](seed) for seed in range(test["CORPORA"])]
    wer = [round(jiwer.wer(references, predictions), 9) for predictions, references in corpora]
    cer = [round(jiwer.cer(references, predictions), 9) for predictions, references in corpora]
    write("error_rates", wer=wer, cer=cer)


if __name__ == "__main__":
    makers = {
        "captions": make_captions,
        "tokens": make_tokens,
        "answers": make_answers,
        "error_rates": make_error_rates,
    }
    makers[sys.argv[1]](*sys.argv[2:])
