#!/usr/bin/env bash
# The study of objectives on SDXL: from published weights to one table. --help lists everything.
set -euo pipefail

# Variables; the environment overrides them.
OUTPUT=${OUTPUT:-runs/reproduction}           # Folder of everything that is made.
PYTHON=${PYTHON:-}                            # Default: that of .venv of the repository.
GPU=${GPU:-0}                                 # Index or UUID of the GPU (nvidia-smi -L).
TOPOLOGY=${TOPOLOGY:-h100}                    # GPU or TPU slice of the plan; none: no plan.
OBJECTIVES=${OBJECTIVES:-sft dpo prior_dpo patch_dpo focus_dpo}
SEEDS=${SEEDS:-0}                             # A training of every objective with each.
STEPS=${STEPS:-500}                           # Optimiser steps of a training.
RESOLUTION=${RESOLUTION:-1024}                # Side of all images in pixels.
SAMPLES=${SAMPLES:-1}                         # Images of each prompt in the evaluations.
REFERENCE_SCALE=${REFERENCE_SCALE:-0.78}      # Weight of the references in the evaluations.
SDXL=${SDXL:-}                                # SDXL in diffusers' layout.
ADAPTER=${ADAPTER:-}                          # File of an IP-Adapter-Plus.
IMAGE_ENCODER=${IMAGE_ENCODER:-}              # Folder of the adapter's image encoder.
INPAINTING=${INPAINTING:-}                    # Pipeline with an image encoder, for disrupt.
DINO=${DINO:-}                                # Folders of the networks that measure.
DINOV2=${DINOV2:-}
CLIP=${CLIP:-}
DREAMBENCH=${DREAMBENCH:-}                    # The dataset folder of DreamBench.
LISTS=${LISTS:-}                              # Folder of UNO's lists of prompts.
SEGMENTER=${SEGMENTER:-}                      # Finds masks that photographs lack.
SCENES=${SCENES:-}                            # Manifest for disrupt, instead of DreamBench.
TRAIN_SUBJECTS=${TRAIN_SUBJECTS:-berry_bowl can colorful_sneaker dog2 dog5 duck_toy poop_emoji \
  rc_car vase wolf_plushie}
CONFIG_FLAGS=${CONFIG_FLAGS:-}                # Fields of every configuration.
DISRUPT_FLAGS=${DISRUPT_FLAGS:-}              # More flags of the commands.
PREPARE_FLAGS=${PREPARE_FLAGS:-}
EVALUATE_FLAGS=${EVALUATE_FLAGS:-}
FREE_GB=${FREE_GB:-}                          # Free disk space in GB to require.

usage() {
  cat <<'EOF'
Usage: [VARIABLE=value ...] launch/reproduce.sh [--dry-run] [STAGES]

Trains objectives on SDXL with IP-Adapter-Plus, evaluates them on DreamBench, and prints a table.

  all       all of these (the default):
  fetch     downloads weights (hf), DreamBench and lists of prompts (git), unless paths are given
  base      evaluates the base
  pairs     makes disrupted pairs of photographs, and the data set
  train     trains every objective with every seed
  evaluate  evaluates the trained models
  table     prints the table

  --dry-run prints what is missing, all commands, and time and memory of the plan; runs nothing
  --help    prints this

Run the same line again to resume. Stages that are done are skipped; a training continues from its
newest checkpoint. docs/reproduce.md explains the study.

Variables (default):
  OUTPUT (runs/reproduction)       folder of everything that is made
  PYTHON (.venv/bin/python)        Python with this package
  GPU (0)                          index or UUID of the GPU; JAX_PLATFORMS=cpu needs none
  TOPOLOGY (h100)                  machine of the plan, as for focusdpo_jax.plan; none: no plan
  OBJECTIVES (sft dpo prior_dpo patch_dpo focus_dpo)
  SEEDS (0)                        one training of every objective with each
  STEPS (500)                      optimiser steps of a training
  RESOLUTION (1024)                side of all images in pixels
  SAMPLES (1)                      images of each prompt in the evaluations
  REFERENCE_SCALE (0.78)           weight of the references in the evaluations (PatchDPO's)
  SDXL, ADAPTER, IMAGE_ENCODER, INPAINTING, DINO, DINOV2, CLIP, DREAMBENCH, LISTS
                                   paths of files that are there; empty: fetched to OUTPUT/weights
  SEGMENTER                        entry point that finds masks (docs/data.md), instead of files
                                   NN_mask.png beside the photographs NN.jpg of DREAMBENCH; if
                                   DreamBench is fetched, experiments.photograph_masks makes these
  SCENES                           manifest of your own photographs for disrupt (docs/data.md)
  TRAIN_SUBJECTS (ten subjects)    without SCENES: DreamBench's subjects to train on; they are
                                   left out of the evaluations
  CONFIG_FLAGS                     fields of every configuration, such as
                                   "--config.batch_size=4 --config.accumulate=8"
  DISRUPT_FLAGS, PREPARE_FLAGS, EVALUATE_FLAGS
                                   more flags of these commands
  FLAGS_<OBJECTIVE>                more flags for the trainings of one objective, such as FLAGS_DPO
  FREE_GB (computed)               GB that must be free in OUTPUT

Example:
  launch/single_gpu.sh install && launch/reproduce.sh --dry-run && launch/reproduce.sh
EOF
}

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

absolute() {
  case $1 in
    /* | '') printf %s "$1" ;;
    *) printf %s "$PWD/$1" ;;
  esac
}

is_fetched() {
  [[ " ${fetched[*]-} " == *" $1 "* ]]
}

# done_before NAME TEXT AFTER: whether the stage's file holds TEXT, the commands that it has run,
# and no stage of AFTER was done later.
done_before() {
  local marker=$OUTPUT/done/$1 dependency
  [[ -f $marker && $(<"$marker") == "$2" ]] || return
  for dependency in $3; do
    ! [[ $OUTPUT/done/$dependency -nt $marker ]] || return
  done
}

# stage NAME AFTER COMMAND...: runs commands, unless they are done.
stage() {
  local name=$1 after=$2 command text status
  shift 2
  text=$(printf '%s\n' "$@")
  if done_before "$name" "$text" "$after"; then
    echo "# $name: done"
    return
  fi
  printf '%s\n' "# $name" "$text"
  if ((dry_run)); then
    return
  fi
  for command in "$@"; do
    status=0
    eval "$command" || status=$?
    if ((status)); then
      echo "stage $name ended with status $status; run the same line again to resume" >&2
      exit "$status"
    fi
  done
  mkdir -p "$OUTPUT/done"
  echo "$text" >"$OUTPUT/done/$name.new"
  mv "$OUTPUT/done/$name.new" "$OUTPUT/done/$name"
}

# The commands of stages are texts, with every word quoted except the flags of the variables.
module() {
  quote "$PYTHON" -m "$@"
}

download() {
  quote "$hf" download "$@"
}

fetch() {
  if is_fetched SDXL; then
    stage fetch-sdxl '' "$(download stabilityai/stable-diffusion-xl-base-1.0 --local-dir "$SDXL" \
      --include '*.json' --include '*.txt' --include '*.fp16.safetensors')"
  fi
  if is_fetched ADAPTER || is_fetched IMAGE_ENCODER; then
    stage fetch-adapter '' "$(download h94/IP-Adapter --local-dir "$weights/ip-adapter" \
      models/image_encoder/config.json models/image_encoder/model.safetensors \
      sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors)"
  fi
  if is_fetched INPAINTING; then
    stage fetch-inpainting fetch-adapter \
      "$(download diffusers/stable-diffusion-xl-1.0-inpainting-0.1 --local-dir "$INPAINTING" \
        --include '*.json' --include '*.txt' --include '*.fp16.safetensors')" \
      "$(quote mkdir -p "$INPAINTING/image_encoder")" \
      "$(quote cp -r "$IMAGE_ENCODER/." "$INPAINTING/image_encoder")"
  fi
  if is_fetched DINO; then
    stage fetch-dino '' "$(download facebook/dino-vits16 --local-dir "$DINO" \
      config.json model.safetensors)"
  fi
  if is_fetched DINOV2; then
    stage fetch-dinov2 '' "$(download facebook/dinov2-small --local-dir "$DINOV2" \
      config.json model.safetensors)"
  fi
  if is_fetched CLIP; then
    # The main branch has no safetensors; this is the hub's own conversion.
    stage fetch-clip '' "$(download openai/clip-vit-base-patch32 --revision refs/pr/15 \
      --local-dir "$CLIP" --include '*.json' --include merges.txt --include model.safetensors)"
  fi
  if is_fetched DREAMBENCH; then
    stage fetch-dreambench '' "$(quote rm -rf "$weights/dreambooth")" \
      "$(quote git clone --depth 1 https://github.com/google/dreambooth "$weights/dreambooth")"
  fi
  if is_fetched LISTS; then
    stage fetch-lists '' "$(quote rm -rf "$weights/uno")" \
      "$(quote git clone --depth 1 https://github.com/bytedance/UNO "$weights/uno")"
  fi
}

# DreamBench as it is published has no masks.
masks() {
  stage masks 'fetch-dreambench fetch-dinov2' "$(module experiments.photograph_masks \
    --photographs="$DREAMBENCH" --dinov2="$DINOV2" --sheet="$OUTPUT/masks.png")"
}

# The prompts to evaluate, and the photographs to train on.
split() {
  local words=()
  if ((splits++)); then # `all` comes here twice.
    return
  fi
  if is_fetched DREAMBENCH && [[ -z $SEGMENTER ]]; then
    masks
  fi
  if [[ -z $SCENES ]]; then
    read -ra words <<<"--train_subjects $TRAIN_SUBJECTS ${SEGMENTER:+--segmented}"
  fi
  stage split 'fetch-dreambench fetch-lists masks' "$(module experiments.reproduction split \
    --dreambench "$DREAMBENCH" --lists "$LISTS" --output "$OUTPUT/split" \
    ${words[@]+"${words[@]}"})"
}

# Flags of every configuration.
configuration() {
  quote --config=configs/sdxl_dpo.py --config.resolution="$RESOLUTION" --config.steps="$STEPS" \
    --config.model.pretrained="$SDXL" --config.model.adapter="$ADAPTER" \
    --config.model.image_encoder="$IMAGE_ENCODER" --config.keep_checkpoints=1 \
    --config.data.source=prepared --config.data.path="$OUTPUT/data" --config.data.cache=True
  echo " $CONFIG_FLAGS"
}

# training OBJECTIVE SEED: flags of a training.
training() {
  local own=FLAGS_${1^^}
  echo "$(configuration) --config.objective=$1 --config.seed=$2 ${!own-}"
}

# evaluation NAME AFTER MODEL: one subject, several, and the images of the former compared with
# the reference alone; MODEL are flags.
evaluation() {
  local name=$1 after=$2 model=$3 kind folder copy flags side=policy
  flags="$(quote "${networks[@]}" --samples="$SAMPLES") $EVALUATE_FLAGS"
  for kind in single multi; do
    folder=$OUTPUT/evaluations/$name/$kind
    copy=()
    if [[ $name == base ]]; then
      side=base
    else # The base's images and scores are there already.
      copy=("$(quote mkdir -p "$folder")" "$(quote cp -r "$OUTPUT/evaluations/base/$kind/pictures" \
        "$OUTPUT/evaluations/base/$kind/scores" "$folder")")
    fi
    stage "evaluate-$name-$kind" "split $after" ${copy[@]+"${copy[@]}"} \
      "$(module focusdpo_jax.evaluate) $model $flags $(quote --scenes="$OUTPUT/split/$kind.json" \
        --reference_scale="$REFERENCE_SCALE" --output="$folder")"
  done
  stage "evaluate-$name-one" "evaluate-$name-single" "$(module focusdpo_jax.evaluate) $flags $(
    quote --protocol=one --scenes="$OUTPUT/split/single.json" \
      --images="$OUTPUT/evaluations/$name/single/pictures/$side" \
      --output="$OUTPUT/evaluations/$name/one"
  )"
}

base() {
  split
  evaluation base '' "--workdir=base $(configuration)"
}

pairs() {
  split
  stage disrupt split "$(module focusdpo_jax.disrupt --workdir="$INPAINTING" \
    --resolution="$RESOLUTION" --manifest="${SCENES:-$OUTPUT/split/train/scenes.jsonl}" \
    ${SEGMENTER:+--segmenter="$SEGMENTER"} --output="$OUTPUT/pairs") $DISRUPT_FLAGS"
  stage prepare disrupt "$(module focusdpo_jax.prepare --manifest="$OUTPUT/pairs/manifest.jsonl" \
    --resolution="$RESOLUTION" --output="$OUTPUT/data") $PREPARE_FLAGS"
}

train() {
  local run
  for run in $runs; do
    stage "train-$run" prepare "$(module focusdpo_jax.main --workdir="$OUTPUT/runs/$run") $(
      training "${run%-*}" "${run##*-}"
    )"
  done
}

evaluate() {
  local run
  for run in $runs; do
    evaluation "$run" "train-$run evaluate-base-single evaluate-base-multi" \
      "$(quote --workdir="$OUTPUT/runs/$run")"
  done
}

# Computed every time; it takes seconds.
table() {
  local command
  command="$(module experiments.reproduction table --output "$OUTPUT") --runs $runs"
  printf '%s\n' '# table' "$command"
  if ! ((dry_run)); then
    eval "$command"
  fi
}

all() {
  fetch
  base
  pairs
  train
  evaluate
  table
}

# Time and memory, computed from shapes.
plan() {
  local command
  command="$(module focusdpo_jax.plan --topology="$TOPOLOGY" --json \
    --programs='update,reference pass,sampling') $(training focus_dpo 0) \
--config.model.scan_layers=True --config.data.subject_counts=1.0,"
  if [[ $TOPOLOGY != local ]]; then
    export JAX_PLATFORMS=cpu
    echo 'export JAX_PLATFORMS=cpu'
  fi
  printf '%s\n' "# time and memory on $TOPOLOGY; compiling takes minutes" "$command"
  if [[ $TOPOLOGY == none ]]; then
    echo '# no plan: TOPOLOGY=none'
  elif ! [[ -x $PYTHON ]]; then
    echo "# no plan without PYTHON = $PYTHON"
  else
    "$PYTHON" -m experiments.reproduction time --plan "$command" --steps "$STEPS" \
      --runs "$(wc -w <<<"$runs")" --samples "$SAMPLES" || true
  fi
}

# Fails with all that is missing, before anything runs; a dry run prints it.
check() {
  local name objective found free room problems=()
  for name in ${given[@]+"${given[@]}"}; do
    if ! [[ -e ${!name} ]]; then
      problems+=("$name = ${!name} is missing")
    fi
  done
  if [[ $subcommand == all || $subcommand == fetch ]]; then
    for name in ${fetched[@]+"${fetched[@]}"}; do
      case $name in
        DREAMBENCH | LISTS) found=git ;;
        *) found=$hf ;;
      esac
      if ! command -v "$found" >/dev/null; then
        problems+=("$found is missing, which fetches $name: install huggingface_hub and git, \
or give paths")
        break
      fi
    done
  fi
  if [[ -z $SCENES$SEGMENTER ]] && ! is_fetched DREAMBENCH; then
    for name in $TRAIN_SUBJECTS; do
      if [[ -d $DREAMBENCH ]] && ! compgen -G "$DREAMBENCH/$name/*_mask.png" >/dev/null; then
        problems+=("TRAIN_SUBJECTS: $DREAMBENCH/$name has no NN_mask.png: make them by \
python -m experiments.photograph_masks, or give SEGMENTER")
      fi
    done
  fi
  if [[ -z $runs ]]; then
    problems+=("OBJECTIVES = $OBJECTIVES, SEEDS = $SEEDS: give one or more of each")
  fi
  if ! [[ -x $PYTHON ]]; then
    problems+=("PYTHON = $PYTHON is missing: run launch/single_gpu.sh install")
  else
    for objective in $OBJECTIVES; do
      if ! found=$(eval "$(module focusdpo_jax.main) $(training "$objective" 0) --print_config" \
        2>&1 >/dev/null); then
        problems+=("$objective: $(tail -n 1 <<<"$found")")
      fi
    done
    # JAX may fall back to the CPU with a warning.
    found='import jax; assert jax.default_backend() != "cpu", "no GPU"'
    if ((!dry_run)) && [[ $JAX_PLATFORMS != cpu && ! $subcommand =~ ^(fetch|table)$ ]] &&
      ! found=$("$PYTHON" -c "$found" 2>&1); then
      problems+=("JAX_PLATFORMS = $JAX_PLATFORMS: $(tail -n 1 <<<"$found")")
    fi
  fi
  # The weights; for a training, two checkpoints, the model, and the images.
  room=5
  if is_fetched SDXL && ! [[ -f $OUTPUT/done/fetch-sdxl ]]; then
    room=26
  fi
  for name in $runs; do
    if ! [[ -f $OUTPUT/done/train-$name ]]; then
      room=$((room + 25))
    fi
  done
  room=${FREE_GB:-$room}
  found=$OUTPUT
  until [[ -d $found ]]; do
    found=$(dirname "$found")
  done
  free=$(df -Pk "$found" | awk 'NR == 2 { print int($4 / 1000000) }')
  if ((free < room)); then
    problems+=("OUTPUT = $OUTPUT: $free GB are free, about $room are needed; \
give another folder, or FREE_GB")
  fi
  if ((${#problems[@]} && dry_run)); then
    printf '# missing: %s\n' "${problems[@]}"
  elif ((${#problems[@]})); then
    found=$(printf '%s; ' "${problems[@]}")
    fail "${found%; }"
  fi
}

read_words "$@"
subcommand=${subcommand:-all}
case $subcommand in
  all | fetch | base | pairs | train | evaluate | table) ;;
  *) fail "$subcommand is no stage: give all, fetch, base, pairs, train, evaluate or table" ;;
esac
if ((${#arguments[@]})); then
  fail "one stage at a time: ${arguments[*]}; flags are given in variables (--help)"
fi
OUTPUT=$(absolute "$OUTPUT")
weights=$OUTPUT/weights
PYTHON=$(absolute "${PYTHON:-$root/.venv/bin/python}")
SCENES=$(absolute "$SCENES")
hf=$(dirname "$PYTHON")/hf
if ! [[ -x $hf ]]; then
  hf=hf
fi
# Names of the paths that are given, and of those that `fetch` makes.
given=() fetched=()
while read -r name path; do
  if [[ -n ${!name} ]]; then
    given+=("$name")
    printf -v "$name" %s "$(absolute "${!name}")"
  else
    fetched+=("$name")
    printf -v "$name" %s "$weights/$path"
  fi
done <<'END'
SDXL sdxl
ADAPTER ip-adapter/sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors
IMAGE_ENCODER ip-adapter/models/image_encoder
INPAINTING inpainting
DINO dino
DINOV2 dinov2
CLIP clip
DREAMBENCH dreambooth/dataset
LISTS uno/datasets
END
if [[ -n $SCENES ]]; then
  given+=(SCENES)
fi
networks=(--dreambench="$DREAMBENCH" --dino="$DINO" --dinov2="$DINOV2" --clip="$CLIP")
splits=0
runs=
for objective in $OBJECTIVES; do
  for seed in $SEEDS; do
    runs+="$objective-$seed "
  done
done
export CUDA_VISIBLE_DEVICES=$GPU JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
cd "$root"
if ((dry_run)); then
  printf '%s\n' "cd $(quote "$root")" \
    "export CUDA_VISIBLE_DEVICES=$(quote "$GPU") JAX_PLATFORMS=$(quote "$JAX_PLATFORMS")"
fi
check
"$subcommand"
if ((dry_run)); then
  plan
fi
