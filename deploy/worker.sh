#!/usr/bin/env bash
# What happens on one TPU host: installation and the training job. launch_tpu.sh calls it on every worker over ssh,
# deploy/jobset.yaml in every pod, so both run the same thing. It works in the directory of its own checkout.
#
#   worker.sh install                         Python, the pinned packages, the sandbox for code tasks
#   worker.sh start NAME REMOTE CONFIG ...    `supervise` as a service that outlives the connection
#   worker.sh supervise NAME REMOTE CONFIG ...  lpo train in the foreground, its files kept in REMOTE
#   worker.sh stop                            SIGTERM; returns when the position is saved
#   worker.sh state                           prints job=running, =done, =stopped, =failed:STATUS, or =none
#   worker.sh logs                            the log, and what is added to it
#
# NAME is the run: its files are in runs/NAME. REMOTE is gs://bucket/path or "-": checkpoints go to REMOTE/checkpoints,
# written by all hosts; the small files of runs/NAME are copied to REMOTE/files by the one host that writes them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UNIT=lpo
LOG=runs/lpo.log
ENDED=runs/lpo.exit # the last job's status; missing while one runs, and after a reboot that cut one short
STOPPED=runs/lpo.stopped # it was told to end: nobody should start it again unasked
PULLED=runs/lpo.pulled

as_root() {
  if ((EUID)); then sudo "$@"; else "$@"; fi
}

install() {
  # The TPU images are Ubuntu 22.04 with Python 3.10; uv brings the one that constraints.txt was made with.
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  export PATH="$HOME/.local/bin:$PATH"
  [[ -x .venv/bin/python ]] || uv venv --quiet --python 3.11 .venv
  uv pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[tpu]'
  # A fresh VM updates itself and holds dpkg's lock for a while.
  command -v bwrap >/dev/null || as_root apt-get -o DPkg::Lock::Timeout=300 install -y -qq bubblewrap >/dev/null
  .venv/bin/lpo --version
}

# systemd, not tmux or nohup: the service belongs to no login session, there can be only one, its log needs no terminal,
# and when the machine is shut down (a preemption gives 30 seconds) it gets the SIGTERM on which `lpo train` saves.
start() {
  stop
  rm -f "$ENDED" "$STOPPED"
  as_root systemd-run --quiet --collect --unit="$UNIT" --uid="$(id -u)" --gid="$(id -g)" \
    --working-directory="$PWD" --setenv=HOME="$HOME" --setenv=PATH="$PATH" \
    --property=KillMode=mixed --property=TimeoutStopSec=600 \
    --property=StandardOutput="append:$PWD/$LOG" --property=StandardError="append:$PWD/$LOG" \
    "$PWD/deploy/worker.sh" supervise "$@"
}

supervise() {
  local name=$1 remote=$2 config=$3
  shift 3
  local output=runs/$name where=() status=0 trainer='' copier terminated='' told=''
  mkdir -p runs
  trap tell TERM INT # before there is anyone to tell: the signal may come at any time
  if [[ $remote != - ]]; then
    where=(--checkpoint.directory="$remote/checkpoints")
    pull "$output" "$remote"
  fi
  if [[ $terminated ]]; then # nothing runs that would have to save
    echo 143 >"$ENDED"
    return 143
  fi
  .venv/bin/lpo train "$config" --resume --output="$output" "${where[@]}" "$@" &
  trainer=$!
  if [[ $terminated ]]; then tell; fi
  while [[ $remote != - ]] && sleep "${LPO_COPY_SECONDS:-300}"; do push "$output" "$remote"; done &
  copier=$!
  wait "$trainer" || status=$?
  if [[ $terminated ]]; then # the signal ended the wait, not the trainer, which is saving
    status=0
    wait "$trainer" || status=$?
  fi
  while kill "$copier" 2>/dev/null; do sleep 0.1; done # a signal to a process just forked may be lost
  if [[ $remote != - ]]; then push "$output" "$remote"; fi
  echo "$status" >"$ENDED"
  return "$status"
}

# In `supervise`: passes the signal on, once: on a second one the trainer would not wait for its saving.
tell() {
  terminated=yes
  if [[ $trainer && ! $told ]]; then
    told=yes
    kill -TERM "$trainer" 2>/dev/null || true
  fi
}

# A replaced VM has an empty disk: metrics so far come back, and the trainer cuts them at its checkpoint. The responses
# of earlier steps, which nothing here reads, stay in the bucket.
pull() {
  if [[ -d $1 ]] || ! gcloud storage ls "$2/files/config.yaml" >/dev/null 2>&1; then return; fi
  mkdir -p "$1"
  gcloud storage rsync --recursive --exclude='^(rollouts|validation)/' "$2/files" "$1"
  touch "$PULLED"
}

# Every host has pulled the files, only the coordinator writes them: a host that has not written leaves them alone.
push() {
  local rows=$1/metrics.jsonl
  if [[ ! -s $rows || ( -e $PULLED && ! $rows -nt $PULLED ) ]]; then return; fi
  gcloud storage rsync --recursive "$1" "$2/files" || echo "worker.sh: $2/files: not copied this time" >&2
}

# Also while it is saving on its way out.
running() {
  [[ $(systemctl show --property=ActiveState --value "$UNIT") =~ ^(active|activating|deactivating)$ ]]
}

stop() {
  mkdir -p runs
  if running; then
    touch "$STOPPED"
    as_root systemctl stop "$UNIT"
  fi
}

state() {
  if running; then
    echo "job=running"
  elif [[ -e $STOPPED ]]; then
    echo "job=stopped"
  elif [[ ! -e $ENDED ]]; then
    echo "job=none"
  elif [[ $(<"$ENDED") == 0 ]]; then
    echo "job=done"
  else
    echo "job=failed:$(<"$ENDED")"
  fi
}

logs() {
  exec tail -n 100 -F "$LOG"
}

case ${1:-} in
install | start | supervise | stop | state | logs) "$@" ;;
*)
  echo "worker.sh: '${1:-}': expected install, start, supervise, stop, state or logs" >&2
  exit 2
  ;;
esac
