"""The texts of the report, in English and Chinese.

English is the key of the page's short phrases, as in gettext: a phrase that has no
Chinese yet shows in English. Advice is keyed by its code in both languages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tunesmith.core.errors import UsageError

Translator = Callable[[str], str]
LANGUAGES = {"en": "en", "zh": "zh-CN"}

_ADVICE = {
    "not_finite": (
        "The loss was not a number at {count} logged steps, first at step {step}. The run was"
        " numerically unstable: lower the learning rate or clip the gradient harder, and train in"
        " bf16 or fp32 rather than fp16.",
        "有 {count} 个记录步的损失不是数值，最早在第 {step} 步。训练数值不稳定：请降低学习率或"
        "收紧梯度裁剪，并使用 bf16 或 fp32 而不是 fp16。",
    ),
    "gradient_nan": (
        "The loss is a number but the gradient norm was not, at {count} logged steps, first at"
        " step {step}. This is known of some attention kernels: turn flash attention off.",
        "损失正常，但梯度范数在 {count} 个记录步不是数值，最早在第 {step} 步。已知某些注意力内"
        "核会如此：请关闭 flash attention。",
    ),
    "gradient_zero": (
        "The gradient norm is exactly 0 at {zeros} of {of} logged steps: nothing is being trained."
        " Look whether cutoff_len cuts the answers off and whether lora_target names layers of"
        " this model.",
        "{of} 个记录步中有 {zeros} 个梯度范数恰为 0：没有任何参数在训练。请检查 cutoff_len 是否"
        "截掉了回答，以及 lora_target 是否是该模型的层。",
    ),
    "few_rows": (
        "There are only {rows} rows of data. Below {needed} the model learns these rows rather than"
        " what they have in common, and the held-out loss rests on a handful of answers.",
        "数据只有 {rows} 条。少于 {needed} 条时，模型记住的是这些条目而不是它们的共性，留出集损"
        "失也只取决于寥寥几条回答。",
    ),
    "few_steps": (
        "The whole run is {steps} optimizer steps. Below {needed} the warmup takes most of them:"
        " train for more epochs or accumulate fewer gradients.",
        "整个训练只有 {steps} 个优化步。少于 {needed} 步时大部分都在预热：请增加训练轮数或减少梯"
        "度累积。",
    ),
    "few_points": (
        "Only {points} losses were logged, too few to read a course from ({needed} are needed)."
        " Log every step to see more.",
        "只记录了 {points} 个损失，不足以看出走势（需要 {needed} 个）。请每步都记录。",
    ),
    "few_spikes": (
        "Few spikes ({count}); the highest is {loss:.2f} at step {step}, where its neighbours lie"
        " at {level:.2f}. So few are mostly odd batches and need no change.",
        "尖峰很少（{count} 个），最高在第 {step} 步，为 {loss:.2f}，相邻各步约 {level:.2f}。"
        "这么少的尖峰多半是个别批次特殊，不必改动。",
    ),
    "spikes": (
        "{count} spikes; the highest is {loss:.2f} at step {step}, where its neighbours lie at"
        " {level:.2f}. Lower the learning rate or clip the gradient harder.",
        "有 {count} 个尖峰，最高在第 {step} 步，为 {loss:.2f}，相邻各步约 {level:.2f}。请降低学"
        "习率或收紧梯度裁剪。",
    ),
    "memorised": (
        "The loss ended at {end:.3f}, under {limit:g}: the model says the training rows by heart."
        " Train for fewer epochs or with more data.",
        "损失最终为 {end:.3f}，低于 {limit:g}：模型已把训练数据背了下来。请减少训练轮数或增加数"
        "据。",
    ),
    "rising": (
        "The loss rose again, from {least:.2f} at step {step} to {end:.2f}: the training diverges."
        " Lower the learning rate.",
        "损失又回升了，从第 {step} 步的 {least:.2f} 升到 {end:.2f}：训练正在发散。请降低学习率。",
    ),
    "flat": (
        "The loss did not fall: {start:.2f} at the start, {end:.2f} at the end. Raise the learning"
        " rate, and look whether the template fits the model.",
        "损失没有下降：开始 {start:.2f}，结束 {end:.2f}。请提高学习率，并检查模板是否与模型匹配。",
    ),
    "slow": (
        "The loss fell steadily but little, from {start:.2f} to {end:.2f} ({share:.0%}). A larger"
        " learning rate would get further in the same time.",
        "损失稳步下降但幅度很小，从 {start:.2f} 到 {end:.2f}（{share:.0%}）。更大的学习率能在同"
        "样时间里走得更远。",
    ),
    "still_falling": (
        "The loss was still falling when the training ended: its last third took off"
        " {tail_fall:.2f} of the whole fall of {start:.2f} to {end:.2f} ({tail_share:.0%}). More"
        " epochs would bring more.",
        "训练结束时损失仍在下降：从 {start:.2f} 降到 {end:.2f} 的全程中，最后三分之一还降了 "
        "{tail_fall:.2f}（{tail_share:.0%}）。增加训练轮数会更好。",
    ),
    "overfit": (
        "The validation loss was lowest at step {step} ({best:.2f}) and rose to {last:.2f} by step"
        " {last_step} (+{rise:.0%}) while the training loss fell from {train_then:.2f} to"
        " {train_last:.2f}: the model overfits. Stop earlier.",
        "验证损失在第 {step} 步最低（{best:.2f}），到第 {last_step} 步升至 {last:.2f}（+"
        "{rise:.0%}），而训练损失从 {train_then:.2f} 降到 {train_last:.2f}：模型过拟合。请提前"
        "停止。",
    ),
    "no_gain": (
        "The held-out loss did not fall: {before:.2f} before, {after:.2f} after. What was learned"
        " does not carry over to rows the model has not seen.",
        "留出集损失没有下降：训练前 {before:.2f}，训练后 {after:.2f}。所学没有迁移到未见过的数据。",
    ),
    "forgetting": (
        "The model has forgotten: the loss on the guard set, general prompts that were not"
        " trained, rose from {before:.2f} to {after:.2f} (+{rise:.0%}). Train more gently, or mix"
        " general rows into the data.",
        "模型出现遗忘：在未参与训练的通用守护集上，损失从 {before:.2f} 升至 {after:.2f}"
        "（+{rise:.0%}）。请放缓训练，或在数据中混入通用数据。",
    ),
    "fewer_right": (
        "Of {of} general prompts the model answers {after} right, the base {before}, though their"
        " loss hardly rose: look at the guard set's answers for what was trained speaking there"
        " too.",
        "{of} 条通用提示中模型答对 {after} 条，基座答对 {before} 条，而损失几乎没有上升：请查看"
        "守护集的回答，训练内容是否也出现在那里。",
    ),
    "healthy": (
        "The curve is healthy: the loss fell from {start:.2f} to {end:.2f} ({share:.0%}) over"
        " {points} logged steps, and nothing in it asks for a change.",
        "曲线健康：在 {points} 个记录步里损失从 {start:.2f} 降到 {end:.2f}（{share:.0%}），"
        "没有需要改动之处。",
    ),
}


def checked_language(language: str) -> str:
    """Return `language`, or raise UsageError if the report does not support it."""
    if language not in LANGUAGES:
        known = ", ".join(LANGUAGES)
        raise UsageError(f"report language {language!r} is unknown", hint=f"use one of: {known}")
    return language


def advice_text(code: str, figures: Mapping[str, float | int | str], language: str) -> str:
    """Return the sentence of an advice with its values filled in."""
    english, chinese = _ADVICE[code]
    return (chinese if language == "zh" else english).format(**figures)


def translator(language: str) -> Translator:
    """Return the function that gives a short English phrase in `language`."""
    words = _CHINESE if language == "zh" else _ENGLISH
    return lambda phrase: words.get(phrase, phrase)


# Keys that are not phrases: names of prompt renderers in parity.json.
_ENGLISH = {
    "renderer chat": "LLaMA-Factory's chat",
    "renderer inv_chat": "inv chat",
    "renderer api": "LLaMA-Factory's API",
    "renderer chat_template": "chat template (transformers, vLLM)",
    "renderer modelfile": "Modelfile (Ollama)",
}


_CHINESE: dict[str, str] = {
    "queued": "排队中",
    "running": "运行中",
    "succeeded": "成功",
    "failed": "失败",
    "stopped": "已停止",
    "unknown": "未知",
    "ended without a word": "中断，未留下记录",
    "before": "训练前评测",
    "train": "训练",
    "after": "训练后评测",
    "merge": "合并",
    "proof": "合并验证",
    "predict": "预测",
    "State": "状态",
    "Held-out loss": "留出集损失",
    "Prompts met": "达标提示",
    "Merge proof": "合并验证",
    "Guard set": "守护集",
    "general prompts": "通用提示",
    "right answers": "答对",
    "{before} → {after} of {of} right": "答对 {before} → {after}，共 {of} 条",
    "exact matches": "完全匹配",
    "On general prompts its loss rose by {share:.0%}.": "在通用提示上损失上升了 {share:.0%}。",
    "On general prompts its loss fell by {share:.0%}.": "在通用提示上损失下降了 {share:.0%}。",
    "On general prompts its loss is what it was.": "在通用提示上损失基本不变。",
    (
        "General prompts that no run trains on: what their loss and answers lose, the model has "
        "forgotten."
    ): "任何训练都不使用的通用提示：其损失变差、回答变差，就是模型的遗忘。",
    "The {count} prompts and their answers": "{count} 条提示及其回答",
    "Prompt parity": "提示一致性",
    (
        "The ids that each way to the merged model puts before it, against those of the training "
        "({probes} prompts, {ids} ids)."
    ): "各种调用方式送入合并模型的词元编号与训练时对比（{probes} 条提示，{ids} 个编号）。",
    "The trained prompt": "训练时的提示",
    "answers end with": "回答的结束符",
    "Way": "方式",
    "First difference": "首个差异",
    "agrees": "一致",
    "differs": "不一致",
    "renderer chat": "LLaMA-Factory 对话",
    "renderer inv_chat": "inv chat",
    "renderer api": "LLaMA-Factory API",
    "renderer chat_template": "对话模板（transformers、vLLM）",
    "renderer modelfile": "Modelfile（Ollama）",
    "end of answers": "回答的结束",
    "Accepted by the user at the merge.": "用户在合并时已接受此差异。",
    "Corrected in the export": "导出时已更正",
    "As LLaMA-Factory exports it": "LLaMA-Factory 的导出",
    "As the model was trained": "与训练一致的版本",
    "the comparison of prompts": "提示的对比",
    "comparison of runs": "运行对比",
    "Results": "结果",
    "The best of a line is green.": "每行最好的值为绿色。",
    "Each run: the trend of its training loss, and its validation loss dotted.": (
        "每个运行：训练损失的趋势，点线为验证损失。"
    ),
    "Training and validation loss of the runs by step": "各运行随步数的训练与验证损失",
    "Parameters that differ": "不同的参数",
    "None: the configs are the same.": "无：配置相同。",
    "Answers after training": "训练后的回答",
    "base model": "基座模型",
    "last training loss": "最后的训练损失",
    "held-out loss, before": "留出集损失，训练前",
    "held-out loss, after": "留出集损失，训练后",
    "guard loss, before": "守护集损失，训练前",
    "guard loss, after": "守护集损失，训练后",
    "guard set, right answers": "守护集，答对",
    "tokens per second": "词元/秒",
    "cost": "费用",
    "Peak memory": "内存峰值",
    "parameters": "参数",
    "accepted": "已接受",
    "The held-out rows are not the same ones: their losses say little of each other.": (
        "留出数据不相同：损失之间几乎不可比较。"
    ),
    "The templates differ: losses are of other tokens.": "模板不同：损失对应的词元不同。",
    "The base models differ: losses are of other tokens.": "基座模型不同：损失对应的词元不同。",
    "Cost of these phases at {rate} an hour: {total}.": (
        "按每小时 {rate} 计，这些阶段的费用：{total}。"
    ),
    "Time": "用时",
    "Started": "启动方式",
    "by the user": "由用户启动",
    "by a resume": "由 resume 继续",
    "by the start of the host": "主机开机后自动继续",
    "by the restart of its container": "容器重启后继续",
    "by its turn in the queue": "排队轮到后启动",
    "by a retry": "重试",
    "step {done} of {total}": "第 {done} 步，共 {total} 步",
    "not measured": "未测量",
    "before only": "仅训练前",
    "after only": "仅训练后",
    "nat per token": "nat/词元",
    "nothing was expected": "没有设定期望",
    "of {of}, before → after": "共 {of} 条，训练前 → 训练后",
    "no merged model was proven": "没有验证过的合并模型",
    "{passed} of {of} checks": "{of} 项检查通过 {passed} 项",
    "passed": "通过",
    "not recorded": "未记录",
    "of it training": "其中训练",
    "The held-out loss fell by {share:.0%}, from {before:.2f} to {after:.2f}.": (
        "留出集损失下降 {share:.0%}，从 {before:.2f} 降到 {after:.2f}。"
    ),
    "The held-out loss did not fall: {before:.2f} before, {after:.2f} after.": (
        "留出集损失没有下降：训练前 {before:.2f}，训练后 {after:.2f}。"
    ),
    "The tuned model met {tuned} of {of} prompts, the base model {base}.": (
        "{of} 条提示中，微调模型达标 {tuned} 条，基座模型达标 {base} 条。"
    ),
    "The merged model is proven equal to base model and adapter.": (
        "合并模型已验证与基座模型加适配器等同。"
    ),
    "The merged model did not pass its proof: do not use it.": "合并模型未通过验证：请勿使用。",
    "training report": "训练报告",
    "run": "运行",
    "The run failed": "运行失败",
    "This page is not complete. What is missing, and the command that gets it:": (
        "本页不完整。以下是缺少的内容和补齐它的命令："
    ),
    "Missing here": "此处缺少",
    "the parameters": "训练参数",
    "the state of the run": "运行状态",
    "the curve and the timings": "曲线与用时",
    "the answers of the base model": "基座模型的回答",
    "the answers of the tuned model": "微调模型的回答",
    "the held-out loss": "留出集损失",
    "the proof of the merged model": "合并模型的验证",
    "the versions": "版本信息",
    "is not there": "不存在",
    "was not part of this run": "不在本次运行的计划内",
    "Curve": "曲线",
    ("Training loss at each log and its trend, validation loss, and the learning rate below."): (
        "每次记录的训练损失及其趋势、验证损失，下方为学习率。"
    ),
    "Median throughput: {rate} tokens per second.": "吞吐量中位数：{rate} 词元/秒。",
    "ended by the token limit": "因词元上限而截断",
    "not possible": "无法检查",
    "{skipped} not possible": "{skipped} 项无法检查",
    "Since the start": "距开始",
    "Merge and prove the result": "合并并验证结果",
    "needed": "需要",
    " ": "",
    " or ": " 或 ",
    "Diagnosis": "诊断",
    "Try": "建议设置",
    "now": "现为",
    "Before and after": "训练前后对比",
    "The same prompts to the base model and to the tuned model, decoded greedily.": (
        "对基座模型和微调模型使用相同的提示，贪心解码。"
    ),
    "Prompts": "提示",
    "Held-out rows, which the training never saw": "留出数据（训练中从未出现）",
    "Met when the answer matches": "回答匹配以下内容即为达标：",
    "Prompt": "提示",
    "Before": "训练前",
    "After": "训练后",
    "Reference": "参考",
    "met": "达标",
    "not met": "未达标",
    "not asked": "未提问",
    "(an empty answer)": "（空回答）",
    "the rest of this answer": "回答的其余部分",
    "Measured on the held-out rows": "在留出数据上的测量",
    "loss (nat/token)": "损失（nat/词元）",
    "perplexity": "困惑度",
    "rows": "条数",
    "answer tokens": "回答词元数",
    "time (s)": "用时（秒）",
    "Decoding": "解码",
    ("The merged model was loaded in a fresh process and compared with base model and adapter."): (
        "合并模型在全新进程中加载，并与基座模型加适配器对比。"
    ),
    "Tolerance": "容差",
    "Check": "检查",
    "Result": "结果",
    "What was found": "发现",
    "Parameters": "参数",
    "The exact config of the training.": "训练所用的确切配置。",
    "Written from": "来自",
    "Model": "模型",
    "Method": "方法",
    "Validation": "验证",
    "Data": "数据",
    "Output": "输出",
    "Training": "训练",
    "Other": "其他",
    "owned": "托管",
    "override": "覆盖",
    "changed": "已调整",
    (
        "owned: set by tunesmith, for the reason given. override: given on the command line. "
        "changed: lowered or raised while the run went on."
    ): ("托管：由 tunesmith 设定，原因见旁注。覆盖：在命令行给出。已调整：运行途中被调低或调高。"),
    "file": "文件",
    "sha256": "sha256",
    "held out": "留出",
    "cut": "截断",
    "{full} of {rows} rows fill cutoff_len {cutoff_len}; what is longer was cut": (
        "{rows} 条中有 {full} 条填满了 cutoff_len {cutoff_len}，超出的部分已被截掉"
    ),
    "{untrained} of {rows} rows have no token to train on": (
        "{rows} 条中有 {untrained} 条没有可训练的词元"
    ),
    "{rows} rows, {tokens} answer tokens": "{rows} 条，{tokens} 个回答词元",
    "Phase": "阶段",
    "attempts": "次尝试",
    "Events of note": "值得注意的事件",
    "What happened": "经过",
    "detail": "详情",
    "Versions and files": "版本与文件",
    "Base model": "基座模型",
    "Merged model": "合并模型",
    "File": "文件",
    "Size": "大小",
    "Run it again": "再次运行",
    "Train the same again": "以相同配置再训练",
    "Continue this run": "继续本次运行",
    "Merge again": "重新合并",
    "Talk to the tuned model": "与微调模型对话",
    "Write this report again": "重新生成本报告",
    (
        "Written by tunesmith from the files of the run folder. This page fetches nothing "
        "and runs no script."
    ): ("由 tunesmith 根据运行文件夹中的文件生成。本页不访问网络，也不运行脚本。"),
    "Resumed at step {step} from {checkpoint}; {lost} logged steps were done again.": (
        "从 {checkpoint} 的第 {step} 步恢复；{lost} 个已记录的步重做。"
    ),
    "Discarded {checkpoint}: {why}.": "弃用 {checkpoint}：{why}。",
    "Changed {what} from {from} to {to}: {why}.": "{what} 由 {from} 改为 {to}：{why}。",
    "Paused at step {step}: {why}.": "在第 {step} 步暂停：{why}。",
    "Continued at step {step}.": "在第 {step} 步继续。",
    "Started {phase} again after {failure}: {why}": "{failure} 之后重新开始 {phase}：{why}",
    "Failure of class {failure}: {message}": "{failure} 类故障：{message}",
    "The run ended: {state}.": "运行结束：{state}。",
    "Training and validation loss by step, learning rate below": (
        "各步的训练与验证损失，下方为学习率"
    ),
    "No loss was logged.": "没有记录到损失。",
    "training, each log": "训练（每次记录）",
    "training, smoothed": "训练（平滑）",
    "validation": "验证",
    "loss not a number": "损失不是数值",
    "checkpoint": "检查点",
    "resumed at step {step}": "从第 {step} 步恢复",
    "rate": "学习率",
    "step": "步",
    "start": "开始",
    "end": "结束",
    "share": "降幅",
    "points": "点数",
    "count": "次数",
    "zeros": "零值",
    "of": "共",
    "least": "最低",
    "steps": "步数",
    "loss": "损失",
    "level": "邻近值",
    "limit": "界限",
    "tail fall": "末段降幅",
    "tail share": "末段占比",
    "best": "最低值",
    "last step": "末步",
    "last": "末值",
    "rise": "升幅",
    "train then": "当时训练损失",
    "train last": "末训练损失",
    "Met": "达标",
    "yes": "是",
    "no": "否",
    "{hidden} more answers are in report.html": "另有 {hidden} 条回答见 report.html",
}
