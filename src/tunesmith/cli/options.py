"""Help texts and values of options that several verbs share."""

from __future__ import annotations

ON = "target: local (default), container, or a host"
ON_SERVICE = "target: local (default) or a host"
ON_RUNS = "target: local (default), container, a host, several (gpu1,gpu2), or all"
HOST = "a host"
HOSTS = "a host, or several: gpu1,gpu2"
RUN = "run id (default: the newest run)"
CONFIG = "LLaMA-Factory YAML; may be given as a bare word"
OVERRIDES = "key=value words, as LLaMA-Factory takes them"
MIRROR = "mirror profile: default, cn (configs/mirrors/), or a file of your own (.yml)"
MIRROR_OF_RUN = f"{MIRROR}; a host uses the one it was provisioned with"
FLAVOUR = "CUDA build: cu128 (default) or cu126"
WITH = "packages that some configs need, separated by commas: galore,tensorboard"
LOCAL_PORT = "port on this machine (default: a free one)"
DATASET_DIR = "folder of dataset_info.json"
OPEN = "open the browser (default); --no-open only prints the address"

LANGUAGES = ("en", "zh")
MODELS = ("base", "adapter", "merged")
TRAIN_CONFIG = "configs/train/smollm2_135m_lora_sft.yaml"
PREDICT_CONFIG = "configs/predict/smollm2_135m_lora_sft.yaml"
