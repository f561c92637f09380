"""Questions with four answers, by the log-probability of each answer's letter.

python docs/examples/multiple_choice.py [MODEL]
"""

import sys

import hybridgen

EXAMPLES = "Question: 1 + 1 = ?\nA. 3\nB. 2\nC. 5\nD. 4\nAnswer: B\n\n"
QUESTIONS = [
    ("2 + 2 = ?", ["3", "5", "4", "6"], "C"),
    ("What does len('ab') return?", ["2", "1", "0", "3"], "A"),
]

model = sys.argv[1] if len(sys.argv) > 1 else None
with hybridgen.Engine.load(model) as engine:
    prompts = [
        EXAMPLES + f"Question: {question}\n" + "".join(f"{c}. {a}\n" for c, a in zip("ABCD", answers)) + "Answer:"
        for question, answers, _ in QUESTIONS
    ]
    # Each prompt four times: its keys and values are computed once.
    scores = engine.score([p for p in prompts for _ in "ABCD"], [f" {c}" for _ in prompts for c in "ABCD"])

right = 0
for index, (question, _, answer) in enumerate(QUESTIONS):
    sums = [score.sum for score in scores[4 * index : 4 * index + 4]]
    chosen = "ABCD"[sums.index(max(sums))]
    right += chosen == answer
    print(f"{question} {chosen} (right: {answer}); {[round(value, 2) for value in sums]}")
print(f"{right} of {len(QUESTIONS)} right")
