"""lm-evaluation-harness on a task of your own: pip install "hybridgen[lm-eval]".

python docs/examples/evaluate.py [MODEL]
"""

import json
import sys
import tempfile
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from hybridgen.integrations.lm_eval import HybridgenLM

TASK = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
"""

model = sys.argv[1] if len(sys.argv) > 1 else None
with tempfile.TemporaryDirectory() as directory:
    data = Path(directory, "data.jsonl")
    rows = [{"question": f"{a} + 1 =", "choices": [f" {a + 1}", f" {a + 3}"], "label": 0} for a in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path(directory, "sums.yaml").write_text(TASK.format(data=data))
    manager = TaskManager(include_path=directory, include_defaults=False)
    results = simple_evaluate(model=HybridgenLM(model), tasks=["sums"], task_manager=manager, bootstrap_iters=0)
print(f"accuracy {results['results']['sums']['acc,none']:.2f}")
