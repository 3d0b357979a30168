"""Stands in for train.py where a test is about the grid: the same options, lock, log and results, but no training.

An epoch takes 0.05 s. What a start saw is appended to `starts`; `made` says who made the run. Fold 4 fails; seed 666
does not hear SIGTERM. Validation accuracy is 60 % with the model's best lr and 50 % with any other; from lr 10 on the
loss is not finite.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import options, runs
from common.errors import BUSY, DIVERGED, RunBusy
from common.weights import weights_identity

BEST = dict(resnet18=0.1, twistnet18=0.01)

args = options.parse_args()
if args.seed == 666:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
folder = Path(args.run_dir) / runs.run_name(args.name or args.dataset, args.fold, args.model, args.seed)
try:
    runs.claim(folder)
except RunBusy:
    sys.exit(BUSY)
if (folder / 'results.json').exists():
    sys.exit(0)
values = {k: v for k, v in vars(args).items() if k != 'force'}
defines = options.defining(values) | dict(pretrained=weights_identity(args.model, args.pretrained))
runs.write_json(folder / 'config.json', dict(options=values, defines=defines))
seen = {key: os.environ.get(key) for key in ('OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES')}
with open(folder / 'starts', 'a') as file:
    file.write(json.dumps(dict(pid=os.getpid(), begin=time.time(), **seen)) + '\n')
if args.fold == 4:
    print('some words\nthe cause', file=sys.stderr)
    sys.exit(1)
if args.lr >= 10:
    sys.exit(DIVERGED)
done = len(runs.read_log(folder / 'log.jsonl')) if (folder / 'log.jsonl').exists() else 0
for epoch in range(done, args.epochs):
    time.sleep(0.05)
    with open(folder / 'log.jsonl', 'a') as file:
        file.write(json.dumps(dict(epoch=epoch + 1)) + '\n')
    (folder / 'last.pt').touch()
with open(folder / 'made', 'a') as file:
    file.write(f'{os.getpid()} {time.time()}\n')
best_val_acc = 60.0 if args.lr == BEST.get(args.model) else 50.0
runs.write_json(folder / 'results.json', dict(best_val_acc=best_val_acc, n_train=360, n_val=120, n_test=120))
(folder / 'last.pt').unlink(missing_ok=True)
