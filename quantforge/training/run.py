"""A run from its beginning to its end: a student scored, trained towards a teacher, scored again, and kept."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from quantforge import api, record
from quantforge.calibrate import corpus
from quantforge.calibrate.text_files import STRICT, Reading
from quantforge.distill.gkd import gkd_objective, is_on_policy
from quantforge.distill.losses import KINDS, Objective
from quantforge.errors import PlanError, RecipeError, pick
from quantforge.evaluation import perplexity
from quantforge.evaluation.reference import Reference, digest
from quantforge.memory import PeakMemory
from quantforge.models import load as loading
from quantforge.progress import bar
from quantforge.store import check_report_folder
from quantforge.training import pages, processes, results, state, steps, students, teachers, texts
from quantforge.training.cost import Cost, estimate
from quantforge.training.loop import Curve, Prepare, Settings, StepLoss, train
from quantforge.training.results import Scored, Step, Training
from quantforge.training.students import Student
from quantforge.training.teachers import Live, Teacher

LOSSES = (*KINDS, "gkd", "minillm", "ce")
WRITING = ("gkd", "minillm")
CHECKPOINT, TARGETS, TEXTS = "checkpoint", "teacher.safetensors", "texts.safetensors"
EVALUATED = "perplexity = exp of the mean over non-overlapping windows of the mean cross-entropy of their predictions"


@dataclass(frozen=True)
class Aim:
    """What the student is drawn towards.

    loss         a kind of `Objective`; gkd: JSD(β) on the student's own text in a share of the steps; minillm: the
                 policy gradient of the reverse KL; ce: cross-entropy with the text, without a teacher
    temperature  of both models' predictions; of fkl, rkl, jsd, skew-kl
    hard         share of cross-entropy with the text
    beta         of jsd and gkd; normalized: JSD / (β (1 − β)); skew: of skew-kl
    share        λ of gkd, the share of steps on text that the student writes
    alpha        of minillm, the teacher's share in what is drawn from
    prompt       tokens of a window that are written on from, by the student with gkd and minillm; only what follows
                 counts
    hidden       weight of the squared error between what the blocks of both models give, relative to the teacher's,
                 which is added; of fkl, rkl, jsd, skew-kl
    """

    loss: str = "fkl"
    temperature: float = 1.0
    hard: float = 0.0
    beta: float = 0.5
    normalized: bool = False
    skew: float = 0.1
    share: float = 0.5
    alpha: float = 0.2
    prompt: int = 64
    hidden: float = 0.0

    def __post_init__(self) -> None:
        pick("loss", self.loss, LOSSES)
        if self.loss in KINDS:
            self.objective()
        if self.loss == "gkd":
            self.objective()
            is_on_policy(self.share, 0, 0)
        if not 0 <= self.alpha < 1:
            raise RecipeError(
                244, f"alpha, the teacher's share in sampling, must be from 0 to below 1, not {self.alpha}."
            )
        if self.loss in WRITING and self.hard:
            raise RecipeError(240, f"{self.loss} has no share of cross-entropy (hard {self.hard:g}); fkl or jsd have.")
        if not 0 <= self.hidden < math.inf or (self.hidden and self.loss not in KINDS):
            raise RecipeError(249, f"hidden {self.hidden:g} is a weight of at least 0, of fkl, rkl, jsd and skew-kl.")

    @property
    def looks_at(self) -> tuple[str, ...]:
        """Return the names of the options that the loss looks at."""
        return {
            "jsd": ("temperature", "hard", "beta", "normalized", "hidden"),
            "skew-kl": ("temperature", "hard", "skew", "hidden"),
            "gkd": ("beta", "normalized", "share", "prompt"),
            "minillm": ("alpha", "prompt"),
            "ce": (),
        }.get(self.loss, ("temperature", "hard", "hidden"))

    def objective(self) -> Objective:
        """Return the divergence of a loss that is one; that of gkd is JSD."""
        if self.loss == "gkd":
            return Objective("jsd", beta=self.beta, normalized=True) if self.normalized else gkd_objective(self.beta)
        return Objective(self.loss, self.temperature, self.hard, self.beta, self.normalized, self.skew)

    def record(self) -> dict[str, Any]:
        """Return what the loss looks at, as plain JSON values."""
        return {"loss": self.loss, **{name: getattr(self, name) for name in self.looks_at}}


@dataclass(frozen=True)
class Job:
    """What a run does with a student, whichever it is.

    teacher     the float model whose predictions are aimed at, and those the KL is measured from; None with loss ce
    data        a set, a file, or "self": text that the teacher writes; samples: windows of it, all if None
    evaluation  text that the student is scored on before and after; windows: None is all
    eval_seq_len  tokens of its windows; None: 512, or as many as the model has positions for
    prompts     texts that both models write for the report after training; new: their tokens. 0: none
    rewritten   train on what the teacher writes after the first `aim.prompt` tokens of each window (sequence-level
                distillation); it is kept in `out`
    reading     how text files are read
    inputs      folders of models, into which nothing is written
    targets     "live": the teacher runs beside the student; "kept": its predictions are made once and kept in `out`
    """

    kind: str
    teacher: loading.Source | None
    aim: Aim
    settings: Settings
    data: str = "python-docs"
    samples: int | None = None
    seq_len: int = 512
    evaluation: str = "python-docs"
    windows: int | None = 48
    eval_seq_len: int | None = None
    prompts: int = 0
    new: int = 64
    rewritten: bool = False
    targets: str = "live"
    chunk: int | None = None
    reading: Reading = STRICT
    inputs: tuple[Path, ...] = ()
    device: str = "cpu"
    out: Path | None = None
    resume: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        pick("kind of targets", self.targets, ("live", "kept"))
        if self.aim.loss != "ce" and self.teacher is None:
            raise RecipeError(249, f"loss {self.aim.loss} needs a teacher; name one by --teacher, or take the loss ce.")
        if self.targets == "kept" and self.aim.loss in WRITING:
            raise RecipeError(249, f"{self.aim.loss} needs a live teacher, which can read what the student writes.")
        if self.targets == "kept" and (self.aim.loss == "rkl" or self.aim.temperature != 1 or self.aim.hidden):
            raise RecipeError(
                249,
                "kept targets are the likeliest tokens at temperature 1: rkl, another temperature and hidden states "
                "need --targets live.",
            )
        if self.aim.hidden and self.chunk is not None:
            raise RecipeError(249, "hidden states are compared along with whole logits: leave out the chunk.")
        if self.rewritten and (self.teacher is None or self.out is None):
            raise RecipeError(249, "text that the teacher writes needs a teacher, and a folder to be kept in (--out).")
        if (self.aim.loss in WRITING or self.rewritten) and not 0 < self.aim.prompt < self.seq_len:
            raise RecipeError(
                249, f"a prompt of {self.aim.prompt} tokens leaves nothing of windows of {self.seq_len}; take fewer."
            )
        if self.data == corpus.SELF and self.samples is None:
            raise RecipeError(249, "text that the teacher writes needs a number of windows: --samples 256, say.")

    @property
    def beside(self) -> bool:
        """Tell whether the teacher runs beside the student."""
        return self.teacher is not None and self.targets == "live" and self.aim.loss != "ce"


def check(job: Job) -> None:
    """Refuse what would fail later, before any weight is read: the device, texts by name, the folder."""
    loading.check_device(job.device)
    corpus.check_name(job.evaluation, "evaluation")
    if job.data != corpus.SELF:
        corpus.check_name(job.data, "calibration")
    elif job.teacher is None:
        raise RecipeError(249, "text of the model itself is written by a teacher; name one by --teacher.")
    if job.out is None:
        return
    for folder in (None, *job.inputs):
        check_report_folder(job.out, folder)
    if job.resume:
        if not (job.out / state.NAME).is_dir():
            raise PlanError(293, f"there is no {job.out / state.NAME} to resume from; start without --resume.")
        return
    state.refuse_old(job.out)
    if (job.out / CHECKPOINT).exists():
        raise PlanError(293, f"{job.out / CHECKPOINT} holds an earlier run's result; choose another folder.")


def cost(job: Job, config: Any, *, weights: int, trained: int, checkpointing: bool = False) -> Cost:
    """Return what the run would take, from the student's config alone."""
    settings = job.settings
    micro = settings.micro_batch or settings.batch_size
    return estimate(
        config,
        weights=weights,
        trained=trained,
        optimizer=settings.optimizer,
        micro_batch=micro,
        seq_len=job.seq_len,
        tokens=settings.steps * settings.batch_size * job.seq_len,
        teacher=job.teacher.config if job.beside and job.teacher is not None else None,
        checkpointing=checkpointing,
    )


def run(build: Callable[[], Student], job: Job) -> Training:
    """Train the student that `build` makes as `job` says, and return the record; with `job.out`, keep what came of it.

    The folder then holds checkpoint, training.json, .md and .html, and state to resume from. Under `accelerate launch`
    every process calls this, and the first one writes. Raises the subclasses of QuantForgeError.
    """
    first = PartialState(cpu=job.device == "cpu").is_main_process
    student = build()
    teacher = _open_teacher(student, job)
    ids, data = _training_text(student, job, teacher)
    windows, evaluation = _evaluation_text(student, job)
    made, reference = _record(student, job, data, evaluation), None
    if first:
        made, reference = _begun(made, student, job, teacher, windows)
    loss, prepare = _step(student, job, teacher, ids)
    teacher = None  # which the loss holds, if it runs beside the student
    rates = students.rates(student.model)
    with PeakMemory(job.device, above=0) as memory:
        curve = train(
            student.model,
            ids,
            loss,
            job.settings,
            prepare=prepare,
            out=job.out,
            resume=job.resume,
            facts={**_facts(student, job), "evaluation": digest(windows)},
            lr_of=rates.__getitem__,
        )
    student = _whole(student, build)
    peak = None if job.resume else memory.bytes
    made = replace(made, steps=_points(curve), seconds=sum(curve.seconds), peak_memory=peak)
    return _ended(made, student, job, windows, reference) if first else made


def _open_teacher(student: Student, job: Job) -> nn.Module | None:
    """Load the teacher, if there is one; PlanError if its predictions are not of the student's tokens."""
    if job.teacher is None:
        return None
    own = loading.tokenizer(job.teacher)
    teachers.check_pair(student.tokenizer, own, student.config, job.teacher.config)
    return loading.model(job.teacher, job.device)


def _begun(
    made: Training, student: Student, job: Job, teacher: nn.Module | None, windows: Tensor
) -> tuple[Training, Reference | None]:
    """Score the teacher, and the student before it is trained; keep that, unless it goes on with a run."""
    reference = None
    if teacher is not None and job.teacher is not None:
        reference, level = api.kept_reference(teacher, windows, job.teacher.fingerprint(job.device))
        made = replace(made, level=Scored(level.losses))
    made = replace(made, before=_before(student, job, windows, reference))
    if job.out is not None and not job.resume:  # what a finished run says stays until there is more to say
        pages.write(made, job.out)
    return made, reference


def _ended(made: Training, student: Student, job: Job, windows: Tensor, reference: Reference | None) -> Training:
    """Score the trained student, and keep it."""
    done = student.model if student.rounds_cache else student.finish()
    made = replace(made, after=_scored("after", done, windows, reference))
    if job.prompts and job.teacher is not None:
        teacher = loading.model(job.teacher, job.device)
        with bar("texts", 1) as step:
            made = replace(made, texts=texts.measure(done, teacher, windows[: job.prompts, : job.new], job.new))
            step("")
    if student.rounds_cache:
        student.finish()
    if job.out is not None:
        student.save(job.out / CHECKPOINT, job.resume)
        pages.write(made, job.out)
    return made


def _whole(student: Student, build: Callable[[], Student]) -> Student:
    """Return the trained student in one piece: itself, unless its parameters were split over processes."""
    found = processes.trained(student.model)
    if not any(isinstance(p, DTensor) for p in found.values()):
        return student
    tensors = {name: processes.whole(p.detach()) for name, p in found.items()}
    fresh = build()
    with torch.no_grad():
        for name, parameter in processes.trained(fresh.model).items():
            parameter.copy_(tensors[name])
    return fresh


def _training_text(student: Student, job: Job, teacher: nn.Module | None) -> tuple[Tensor, dict[str, Any]]:
    """Return the training windows, and where they came from; RecipeError if they do not fill a step."""
    writer = None
    if teacher is not None and job.teacher is not None:
        source = job.teacher
        writer = api.Writer(lambda: teacher, lambda: source.fingerprint(job.device))
    ids, data = api.token_ids(
        job.data,
        "calibration",
        tokenizer=student.tokenizer,
        config=student.config,
        seq_len=job.seq_len,
        count=job.samples,
        seed=job.settings.seed,
        writer=writer,
        reading=job.reading,
    )
    size = job.settings.batch_size
    if len(ids) < size:
        raise RecipeError(246, f"batch_size {size} is more than the {len(ids)} windows of the training text.")
    if job.rewritten and teacher is not None:
        ids = _rewritten(student, job, teacher, ids)
        data = {**data, "rewritten": "by the teacher, after the prompt of each window"}
    return ids, data


def _rewritten(student: Student, job: Job, teacher: nn.Module, ids: Tensor) -> Tensor:
    """Return the windows with what the teacher writes after the prompt of each; it is written once, and kept."""
    assert job.teacher is not None
    assert job.out is not None
    prompts, new = ids[:, : job.aim.prompt], job.seq_len - job.aim.prompt
    facts = {"model": job.teacher.digest(), "tokenizer": teachers.tokenizer_digest(student.tokenizer)}
    seed = job.settings.seed
    return teachers.write_texts(job.out / TEXTS, prompts, new, facts, lambda: teacher, seed=seed)


def _evaluation_text(student: Student, job: Job) -> tuple[Tensor, dict[str, Any]]:
    return api.token_ids(
        job.evaluation,
        "evaluation",
        tokenizer=student.tokenizer,
        config=student.config,
        seq_len=job.eval_seq_len or students.usual_length(student.config),
        count=job.windows,
        reading=job.reading,
    )


def _record(student: Student, job: Job, data: dict[str, Any], evaluation: dict[str, Any]) -> Training:
    return Training(
        schema=results.SCHEMA,
        kind=job.kind,
        student=student.name,
        method=student.method,
        teacher="" if job.teacher is None else job.teacher.name,
        aim={**job.aim.record(), "targets": job.targets},
        settings=asdict(job.settings),
        trained=students.trained(student.model),
        data=data,
        evaluation={**evaluation, "protocol": EVALUATED},
        notes=student.notes,
        machine=record.machine(),
        versions=record.versions(),
        command=job.command,
        created=datetime.date.today().isoformat(),
        bits_per_weight=student.bits_per_weight,
    )


def _before(student: Student, job: Job, windows: Tensor, reference: Reference | None) -> Scored:
    """Score the student as it begins, or take that over from the run that is resumed."""
    path = None if job.out is None else job.out / f"{results.NAME}.json"
    if job.resume and path is not None and path.exists():
        earlier = results.from_json(path.read_text(encoding="utf-8"), str(path)).before
        if earlier is not None and len(earlier.losses) == len(windows):
            return earlier
    return _scored("before", student.model, windows, reference)


def _scored(when: str, model: nn.Module, windows: Tensor, reference: Reference | None) -> Scored:
    training = model.training
    model.eval()
    with bar(f"student {when}", len(windows)) as step:
        score = perplexity.evaluate(model, windows, reference, progress=lambda loss: step(f"loss {loss:.3f}"))
    model.train(training)
    return Scored(score.losses, score.kls)


def _step(student: Student, job: Job, model: nn.Module | None, ids: Tensor) -> tuple[StepLoss, Prepare | None]:
    """Return the loss of a step, and what prepares its batch."""
    aim, seed = job.aim, job.settings.seed
    if aim.loss == "ce" or model is None:
        return steps.language_model(chunk=job.chunk), steps.after_prompt(aim.prompt) if job.rewritten else None
    if aim.loss == "gkd":
        loss, write = steps.gkd(Live(model), aim.objective(), share=aim.share, prompt=aim.prompt, seed=seed)
        return loss, _after(aim.prompt, write)
    if aim.loss == "minillm":
        size = job.settings.batch_size
        return steps.minillm(Live(model), prompt=aim.prompt, alpha=aim.alpha, text=ids, batch_size=size, seed=seed)
    taught = _teacher(student, job, model, ids)
    loss = steps.supervised(taught, aim.objective(), hidden=aim.hidden, chunk=job.chunk)
    return loss, steps.after_prompt(aim.prompt) if job.rewritten else None


def _after(prompt: int, write: Prepare) -> Prepare:
    """Let only what follows the prompt count, of the text's windows as of written ones."""
    plain = steps.after_prompt(prompt)

    def prepare(student: nn.Module, batch: Any, step: int) -> Any:
        return write(student, plain(student, batch, step), step)

    return prepare


def _teacher(student: Student, job: Job, model: nn.Module, ids: Tensor) -> Teacher:
    if job.targets == "live" or job.teacher is None:
        return Live(model)
    if job.out is None:
        raise RecipeError(249, "a teacher's predictions are kept in the run's folder; name one by --out.")
    vocab = student.config.get_text_config().vocab_size
    facts = teachers.made(student.tokenizer, job.teacher.digest(), ids, vocab)
    return teachers.kept_teacher(job.out / TARGETS, facts, ids, lambda: model)


def _facts(student: Student, job: Job) -> dict[str, Any]:
    """Return what a run is made of beside its settings and its text."""
    source = job.teacher
    return {
        **student.facts,
        "kind": job.kind,
        "aim": job.aim.record(),
        "targets": job.targets,
        "rewritten": job.rewritten,
        "teacher": None if source is None else source.digest(),
    }


def _points(curve: Curve) -> tuple[Step, ...]:
    columns = (curve.loss, curve.lr, curve.grad_norm, curve.tokens, curve.seconds)
    return tuple(Step(*row) for row in zip(*columns, strict=True))
