#!/usr/bin/env bash
# Run `lpo train` on Cloud TPUs: one VM, a slice of many hosts, or several slices.
#
#   ./launch_tpu.sh COMMAND [OPTION...] [CONFIG [--a.b=value...]]
#
#   up      create the TPU, or reuse the one with that name, and install code and packages on every worker
#   run     start `lpo train CONFIG --resume` on every worker, as a service that does not depend on this connection
#   watch   up and run, then keep watching: create the TPU again after a preemption and resume, until the job ends
#   logs    follow the log of the first worker
#   status  print the states of the TPU and the job
#   stop    stop the job; it saves its position first
#   down    stop the job and delete the TPU
#
#   --name NAME        name of the TPU and of the run                   [$TPU_NAME]
#   --project ID       Google Cloud project                             [$TPU_PROJECT]
#   --zone ZONE        such as us-east5-a                               [$TPU_ZONE]
#   --tpu TYPE         v5p:4x4x4, v5e:4x4, v6e:4x4, as for `lpo plan`    [$TPU_TYPE]
#   --output gs://...  bucket path for checkpoints and files; required for several workers  [$TPU_OUTPUT]
#   --slices N         number of slices of that type, connected by the data-centre network (1)
#   --spot             use cheaper capacity that may be preempted at any time; use it with `watch`
#   --vm               create a TPU VM immediately or fail; without it a queued resource waits for capacity
#   --runtime VERSION  image of the VMs (default: by type)
#   --repo URL         clone this repository instead of copying the working tree; --ref REF is checked out (HEAD)
#   --max-restarts N   restarts of a failed job by `watch` (5); preemptions do not count
#   --poll SECONDS     seconds between two checks of the TPU (30)
#   --dry-run          print every command, ready to paste, and run none
#
#   ./launch_tpu.sh watch --name qwen8b --project me --zone us-east5-a --tpu v6e:4x4 --spot \
#     --output gs://bucket/qwen8b configs/math_8b.yaml --training.steps=200
#
# All arguments after CONFIG are passed to `lpo train`. The run's files are in runs/NAME on the first worker and are copied
# to OUTPUT/files every five minutes and at the end; checkpoints are written directly to OUTPUT/checkpoints. See
# docs/scale.md.
#
# Exit status: 0; 1 if the job or a command failed; 2 for a usage error.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
WORKER="bash lpo_jax/deploy/worker.sh" # run in the home directory of a worker

main() {
  ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "needs bash 4.4 or newer, this is $BASH_VERSION"
  case ${1:-} in
  up | run | watch | logs | status | stop | down) ;;
  -h | --help | help)
    sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    return
    ;;
  '') die "expected a command: up, run, watch, logs, status, stop or down; see --help" ;;
  *) die "unknown command '$1'; the commands are up, run, watch, logs, status, stop and down" ;;
  esac
  local command=$1
  shift
  parse "$command" "$@"
  if [[ ! $dry_run ]] && ! command -v gcloud >/dev/null; then
    die "gcloud is not on PATH; install it (https://cloud.google.com/sdk/docs/install) or use --dry-run"
  fi
  "$command"
}

say() { echo "launch_tpu.sh: $*" >&2; }
die() { say "$*" && exit 2; }
fail() { say "$*" && exit 1; }

# ---- arguments ---------------------------------------------------------------------------------------------------

parse() {
  local command=$1
  shift
  name=${TPU_NAME:-} project=${TPU_PROJECT:-} zone=${TPU_ZONE:-} tpu=${TPU_TYPE:-} output=${TPU_OUTPUT:-}
  slices=1 spot='' kind=queued-resources nodes=(--node=all) runtime='' repo='' ref=HEAD max_restarts=5 poll=30
  dry_run='' job=()
  while (($#)); do
    case $1 in
    --name | --project | --zone | --tpu | --output | --slices | --runtime | --repo | --ref | --max-restarts | --poll)
      (($# > 1)) || die "$1 needs a value"
      local option=${1#--}
      printf -v "${option//-/_}" '%s' "$2"
      shift
      ;;
    --spot) spot=yes ;;
    --vm) kind='tpu-vm' nodes=() ;;
    --dry-run) dry_run=yes ;;
    -*) die "unknown option '$1'; options of \`lpo train\` follow CONFIG; --help lists the options of this script" ;;
    *)
      job=("$@")
      break
      ;;
    esac
    shift
  done
  local what
  for what in name project zone; do
    [[ ${!what} ]] || die "$command needs --$what (or TPU_${what^^} in the environment)"
  done
  [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name $name: use a-z, 0-9 and -, starting with a letter"
  for what in slices max_restarts poll; do
    [[ ${!what} =~ ^[0-9]+$ ]] || die "--${what//_/-} ${!what}: is not an integer"
  done
  ((slices > 0)) || die "--slices 0: must be at least 1"
  [[ $slices == 1 || $kind == queued-resources ]] || die "--slices $slices: needs a queued resource, so --vm is not possible"
  case $command in up | watch)
    [[ $tpu ]] || die "$command needs --tpu (or TPU_TYPE in the environment), such as v5p:4x4x4"
    ;;
  esac
  [[ ! $tpu ]] || parse_type
  case $command in
  run | watch) check_job "$command" ;;
  *) ((${#job[@]} == 0)) || die "$command takes no argument '${job[0]}'; only run and watch take a CONFIG" ;;
  esac
}

# Translates v5p:4x4x4, as for `lpo plan`, into gcloud's v5p-128. The number counts cores for v5p, and chips for v5e and
# v6e; gcloud offers one shape for each number.
parse_type() {
  local generation=${tpu%%:*} shape=${tpu#*:} chips=1 host=8 known image size sizes
  case $generation in
  v5p) known="2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8" host=4 image=v2-alpha-tpuv5 ;;
  v5e) known="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16" image=v2-alpha-tpuv5-lite ;;
  v6e) known="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16" image=v2-alpha-tpuv6e ;;
  *) die "--tpu $tpu: unknown type; the types are v5p, v5e and v6e with a shape, such as v5p:4x4x4 or v6e:4x4" ;;
  esac
  [[ " $known " == *" $shape "* ]] || die "--tpu $tpu: no such slice; the slices of $generation are ${known// /, }"
  IFS=x read -ra sizes <<<"$shape"
  for size in "${sizes[@]}"; do chips=$((chips * size)); done
  many_workers=$((chips > host || slices > 1))
  runtime=${runtime:-$image}
  case $generation in
  v5p) accelerator="v5p-$((2 * chips))" ;;
  v5e) accelerator="v5litepod-$chips" ;;
  v6e) accelerator="v6e-$chips" ;;
  esac
}

check_job() {
  ((${#job[@]})) || die "$1 needs a CONFIG, such as configs/math_8b.yaml"
  local config=${job[0]}
  if [[ ! $repo ]]; then
    [[ $config != /* ]] || die "$config: use a path relative to this repository, which is copied to the workers"
    [[ -f $HERE/$config ]] || die "$config: no such file in $HERE"
  fi
  if [[ $output ]]; then
    [[ $output == gs://?* ]] || die "--output $output: must be gs://bucket/path, which every worker can write to"
    output=${output%/}
  else
    [[ $tpu ]] || die "$1 without --output needs --tpu, to check that there is only one worker; otherwise set --output gs://..."
    ((!many_workers)) || die "$1: $tpu x $slices has several workers, so checkpoints need --output gs://bucket/path"
    [[ ! $spot ]] || say "without --output gs://... a preemption deletes the run together with the VM's disk"
  fi
}

# ---- gcloud ------------------------------------------------------------------------------------------------------

# Runs a TPU command in the project and zone: tpus KIND VERB ARGUMENT...
tpus() { perform gcloud compute tpus "$@" --zone="$zone" --project="$project"; }

# Runs a command, or prints it for pasting in a dry run.
perform() { if [[ $dry_run ]]; then quote "$@"; else "$@"; fi; }

# Prints the words on one line, quoted for a shell where necessary.
quote() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="$word "
  done
  echo "${line% }"
}

# Runs a shell command on every worker of every slice.
everywhere() {
  tpus "$kind" ssh "$name" "${nodes[@]}" --worker=all --command="$1"
}

# Prints the state as one word: the service's own, NOT_FOUND, or UNKNOWN if gcloud fails (no network, no permission).
described() {
  local field=$1 state errors
  shift
  errors=$(mktemp)
  if state=$(tpus "$@" --format="value($field)" 2>"$errors"); then
    echo "${state:-UNKNOWN}"
  elif grep -q 'NOT_FOUND' "$errors"; then
    echo NOT_FOUND
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm -f "$errors"
}

# Sets `state` to the state printed to the user, and `condition` to ready, waiting, lost, absent or unknown.
look() {
  local node fields='state.state,tpu.nodeSpec[0].multisliceParams.nodeCount'
  there=1 # number of slices of the resource
  if [[ $kind == queued-resources ]]; then
    read -r state there <<<"$(described "$fields" queued-resources describe "$name") 1"
    there=${there%% *}
    # A preemption appears in the state of the node first, and only later in the state of the request.
    if [[ $state == ACTIVE ]]; then
      for ((node = 0; node < there; node++)); do
        state=$(described state tpu-vm describe "$(if ((there > 1)); then echo "$name-$node"; else echo "$name"; fi)")
        [[ $state == READY ]] || break
      done
      [[ $state != NOT_FOUND ]] || state=TERMINATED
    fi
  else
    state=$(described state tpu-vm describe "$name")
  fi
  case $state in
  READY) condition=ready ;;
  NOT_FOUND) condition=absent ;;
  PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING | SUSPENDED | SUSPENDING | FAILED) condition=lost ;;
  UNKNOWN) condition=unknown ;;
  *) condition=waiting ;; # WAITING_FOR_RESOURCES, PROVISIONING, CREATING, STARTING, REPAIRING, ...
  esac
}

# Like `look`, but checks that an existing resource is the requested one, because the caller reuses or deletes it.
look_for_mine() {
  look
  case $condition in
  absent | unknown) ;;
  *) ((there == slices)) || fail "$name: has $there slices, not $slices; see --slices" ;;
  esac
}

# Called before any change: gcloud is not logged in, or has no permission.
cannot_see() { fail "$name: gcloud cannot read the state of the TPU; see its error above"; }

create() {
  local flags=(--accelerator-type="$accelerator")
  [[ ! $spot ]] || flags+=(--spot)
  if [[ $kind == tpu-vm ]]; then
    tpus tpu-vm create "$name" "${flags[@]}" --version="$runtime"
  elif ((slices > 1)); then # these flags give the hosts the MEGASCALE_* settings that connect the slices
    tpus queued-resources create "$name" "${flags[@]}" --runtime-version="$runtime" --node-count="$slices" \
      --node-prefix="$name"
  else
    tpus queued-resources create "$name" "${flags[@]}" --runtime-version="$runtime" --node-id="$name"
  fi
}

delete() {
  if [[ $kind == tpu-vm ]]; then
    tpus tpu-vm delete "$name" --quiet
  else
    tpus queued-resources delete "$name" --force --quiet
  fi
}

# Installs code and packages on every worker. Not while a job runs, because its processes still read the files.
install() {
  if [[ $repo ]]; then
    local git="git -C lpo_jax"
    everywhere "{ [ -d lpo_jax/.git ] || git clone --quiet $(quote "$repo") lpo_jax; } && \
$git fetch --quiet origin $(quote "$ref") && $git checkout --quiet --force FETCH_HEAD"
  else
    copy
  fi && everywhere "$WORKER install"
}

# Copies the working tree as git sees it, including changed and new files. Files of an earlier copy are removed first.
copy() {
  local archive=${TMPDIR:-/tmp}/$name.tgz existing pack clear
  # shellcheck disable=SC2016 # expanded by the shell that creates the archive
  existing='while IFS= read -rd "" file; do [ ! -e "$file" ] || printf "%s\0" "$file"; done' # skips deleted files that git still lists
  pack="cd $(quote "$HERE") && git ls-files -coz --exclude-standard | $existing"
  pack+=" | tar --null -T - -czf $(quote "$archive")"
  clear="mkdir -p lpo_jax && find lpo_jax -mindepth 1 -maxdepth 1 ! -name .venv ! -name runs -exec rm -rf {} +"
  perform bash -o pipefail -c "$pack" &&
    tpus "$kind" scp "$archive" "$name:" "${nodes[@]}" --worker=all &&
    everywhere "$clear && tar -xzf $name.tgz -C lpo_jax" &&
    perform rm -f "$archive"
}

# ---- commands ----------------------------------------------------------------------------------------------------

up() {
  local tries=0
  if [[ $dry_run ]]; then # assume that the TPU does not exist
    create
    install
    return
  fi
  look_for_mine
  case $condition in
  ready)
    say "$name: reusing the TPU"
    [[ $(job_state) != running ]] || fail "$name: a job is running; stop it first, because its code would be replaced"
    ;;
  lost)
    say "$name: is $state; deleting it and creating it again"
    delete
    create
    ;;
  absent) create ;;
  unknown) cannot_see ;;
  esac
  while look && [[ $condition != ready ]]; do
    [[ $condition != lost ]] || fail "$name: became $state before it was ready; try again, or another zone"
    say "$name: $state"
    sleep "$poll"
  done
  until install; do # a VM that has just started may refuse connections
    ((++tries < 5)) || fail "$name: cannot be set up; see the error of gcloud above"
    sleep "$poll"
  done
}

run() {
  everywhere "$WORKER start $(quote "$name" "${output:--}" "${job[@]}")"
  say "$name: started; ./launch_tpu.sh logs follows the log"
}

logs() {
  local node=()
  [[ $kind == tpu-vm ]] || node=(--node=0)
  tpus "$kind" ssh "$name" "${node[@]}" --worker=0 --command="$WORKER logs"
}

# Prints the state of the job over all workers: failed:STATUS if one has failed, running if one runs, none if one has
# never started.
job_state() {
  local printed found
  printed=$(everywhere "if [ -e lpo_jax/deploy/worker.sh ]; then $WORKER state; else echo job=none; fi") || return 1
  for found in failed:2 failed: stopped none running 'done'; do
    if [[ $printed == *"job=$found"* ]]; then
      [[ $printed =~ job=("$found"[0-9]*) ]]
      echo "${BASH_REMATCH[1]}"
      return
    fi
  done
  return 1
}

status() {
  if [[ $dry_run ]]; then
    tpus "$kind" describe "$name"
    everywhere "$WORKER state"
    return
  fi
  look
  echo "tpu: $state"
  [[ $condition != ready ]] || echo "job: $(job_state || echo unknown)"
}

# Repeats: check the state, react, wait. After the job has started, an error of gcloud does not end the loop, because the
# next check reads the state again.
watch() {
  if [[ $dry_run ]]; then
    up
    run
    status
    return
  fi
  local started='' restarts=0 now
  while look_for_mine; do
    case $condition in
    absent | lost)
      say "$name: $state; creating it"
      if [[ $condition == lost ]]; then delete || say "$name: could not be deleted; trying again"; fi
      create || [[ $started ]] || fail "$name: cannot be created; see the error of gcloud above"
      ;;
    waiting) say "$name: $state" ;;
    unknown) [[ $started ]] || cannot_see ;;
    ready)
      now=$(job_state) || now=unknown
      [[ $started || $now == running || $now == unknown ]] || now=none # the state of an earlier job
      case $now in
      none) { install && run; } || say "$name: not started yet" ;;
      done)
        say "$name: the job is done; ./launch_tpu.sh down deletes the TPU and ends the costs"
        return
        ;;
      stopped)
        say "$name: the job was stopped; use run or watch to resume it"
        return
        ;;
      failed:2) fail "$name: lpo refused its settings; see ./launch_tpu.sh logs" ;;
      failed:*)
        ((restarts++ < max_restarts)) || fail "$name: the job failed after $max_restarts restarts; see its logs"
        say "$name: the job ended with status ${now#failed:}; restart $restarts of $max_restarts"
        run || say "$name: not started yet"
        ;;
      esac
      [[ $now == unknown ]] || started=yes
      ;;
    esac
    sleep "$poll"
  done
}

stop() { everywhere "$WORKER stop"; }

down() {
  condition=ready
  [[ $dry_run ]] || look
  case $condition in
  absent) say "$name: does not exist" ;;
  unknown) cannot_see ;;
  ready)
    stop || say "$name: the job could not be stopped; deleting the TPU anyway"
    delete
    ;;
  *) delete ;;
  esac
}

main "$@"
