#!/usr/bin/env bash
# Installation and the training job on one TPU host. launch_tpu.sh calls this script on every worker over ssh, and
# deploy/jobset.yaml in every pod, so both run the same commands. It works in the directory of its own checkout.
#
#   worker.sh install                           install Python, the pinned packages, and the sandbox for code tasks
#   worker.sh start NAME REMOTE CONFIG ...      run `supervise` as a service that does not depend on the connection
#   worker.sh supervise NAME REMOTE CONFIG ...  run lpo train in the foreground and copy its files to REMOTE
#   worker.sh stop                              send SIGTERM; return when the position is saved
#   worker.sh state                             print job=running, =done, =stopped, =failed:STATUS, or =none
#   worker.sh logs                              print the log and follow it
#
# NAME is the name of the run, whose files are in runs/NAME. REMOTE is gs://bucket/path or "-". All hosts write
# checkpoints to REMOTE/checkpoints; the host that writes the small files in runs/NAME also copies them to REMOTE/files.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UNIT=lpo
LOG=runs/lpo.log
ENDED=runs/lpo.exit # exit status of the last job; missing while a job runs, and after a reboot that ended one
STOPPED=runs/lpo.stopped # exists if the user stopped the job, so it must not be restarted automatically
PULLED=runs/lpo.pulled # its time is that of the last copy from REMOTE

as_root() {
  if ((EUID)); then sudo "$@"; else "$@"; fi
}

install() {
  # The TPU images are Ubuntu 22.04 with Python 3.10; uv installs the version that constraints.txt was made with.
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  export PATH="$HOME/.local/bin:$PATH"
  [[ -x .venv/bin/python ]] || uv venv --quiet --python 3.11 .venv
  uv pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[tpu]'
  # A new VM updates itself first and holds the lock of dpkg for some time.
  command -v bwrap >/dev/null || as_root apt-get -o DPkg::Lock::Timeout=300 install -y -qq bubblewrap >/dev/null
  .venv/bin/lpo --version
}

# A systemd service instead of tmux or nohup: it does not belong to a login session, only one can run, its log needs no
# terminal, and when the machine is shut down (30 seconds after a preemption notice) it receives SIGTERM, so `lpo train`
# saves its position.
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
  local output=runs/$name where=() status=0 trainer='' copier terminated='' forwarded=''
  mkdir -p runs
  trap forward_signal TERM INT # before the trainer starts, because the signal may arrive at any time
  if [[ $remote != - ]]; then
    where=(--checkpoint.directory="$remote/checkpoints")
    pull "$output" "$remote"
  fi
  if [[ $terminated ]]; then # no trainer is running, so there is nothing to save
    echo 143 >"$ENDED"
    return 143
  fi
  .venv/bin/lpo train "$config" --resume --output="$output" "${where[@]}" "$@" &
  trainer=$!
  if [[ $terminated ]]; then forward_signal; fi
  while [[ $remote != - ]] && sleep "${LPO_COPY_SECONDS:-300}"; do push "$output" "$remote"; done &
  copier=$!
  wait "$trainer" || status=$?
  if [[ $terminated ]]; then # the signal interrupted the wait; the trainer is still saving
    status=0
    wait "$trainer" || status=$?
  fi
  while kill "$copier" 2>/dev/null; do sleep 0.1; done # a signal to a process that was just forked may be lost
  if [[ $remote != - ]]; then push "$output" "$remote"; fi
  echo "$status" >"$ENDED"
  return "$status"
}

# Used in `supervise`: forwards the signal once, because the trainer would exit on a second one without saving.
forward_signal() {
  terminated=yes
  if [[ $trainer && ! $forwarded ]]; then
    forwarded=yes
    kill -TERM "$trainer" 2>/dev/null || true
  fi
}

# A replaced VM has an empty disk: this copies the earlier metrics back, and the trainer truncates them at its checkpoint.
# The responses of earlier steps are not needed here and stay in the bucket.
pull() {
  if [[ -d $1 ]] || ! gcloud storage ls "$2/files/config.yaml" >/dev/null 2>&1; then return; fi
  mkdir -p "$1"
  gcloud storage rsync --recursive --exclude='^(rollouts|validation)/' "$2/files" "$1"
  touch "$PULLED"
}

# All hosts have pulled the files, but only the coordinator writes them, so a host that has not written copies nothing.
push() {
  local rows=$1/metrics.jsonl
  if [[ ! -s $rows || ( -e $PULLED && ! $rows -nt $PULLED ) ]]; then return; fi
  gcloud storage rsync --recursive "$1" "$2/files" || echo "worker.sh: $2/files: this copy failed" >&2
}

# Whether the service runs, which includes the time in which it saves before it exits.
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
