"""A mock of gcloud that records its calls and replies from a script.

$STAND_IN is a folder with `answers.json`. Its keys are verbs, such as `tpu-vm describe`, and parts of shell commands
for the workers; its values are lists of replies, printed one per call, of which the last is repeated. "error: TEXT" is
printed to stderr with exit status 1. Calls are appended to `calls.jsonl`. If an archive is copied to the workers, the
names of its files are written to `copied.txt`.
"""

import json
import os
import sys
from pathlib import Path

folder, argv = Path(os.environ["STAND_IN"]), sys.argv[1:]
with open(folder / "calls.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\n")

if "scp" in argv:
    import tarfile  # imported here because the import is slow

    with tarfile.open(argv[4]) as archive:
        (folder / "copied.txt").write_text("\n".join(archive.getnames()))

script = folder / "answers.json"
answers = json.loads(script.read_text())
verb = " ".join(argv[2:4])
command = next((flag for flag in argv if flag.startswith("--command=")), "")
for key, replies in answers.items():
    if replies and (key == verb or (command and key in command)):
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        script.write_text(json.dumps(answers))
        if reply.startswith("error: "):
            sys.exit(reply.removeprefix("error: "))
        print(reply)
        break
