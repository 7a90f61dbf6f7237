#!/usr/bin/env -S python3 -IS
"""A stand-in for gcloud: writes down how it was called, and answers from a script.

$STAND_IN is a folder with `answers.json`: for `describe` the states one after another (the last one stays), and for
each shell command on the workers whose text contains a key, what it prints one after another. "error: TEXT" goes to
stderr with status 1. Calls are appended to `calls.jsonl`; of an archive that is copied to the workers, the names of
its files are in `copied.txt`.
"""

import json
import os
import sys
from pathlib import Path

folder, argv = Path(os.environ["STAND_IN"]), sys.argv[1:]
with open(folder / "calls.jsonl", "a") as file:
    file.write(json.dumps(argv) + "\n")

if "scp" in argv:
    import tarfile  # here, for it is slow to import

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
