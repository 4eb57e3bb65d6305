"""Which devices a machine has, why one of them does not compute, and which dtypes are slow. Only torch is told other
things than are true."""

import pytest
import tiny
import torch

import ditkit
from ditkit import devices
from ditkit.cli.main import main
from ditkit.errors import SetupError
from ditkit.setup import Setup


@pytest.fixture
def cards(monkeypatch):
    """``cards((9, 0), RuntimeError("broken"))``: a machine with these cards, by compute capability or failure."""

    def put(*capabilities, built=("sm_80", "sm_90", "compute_90")):
        def capability(device):
            index = int(str(device).removeprefix("cuda:"))
            if isinstance(capabilities[index], Exception):
                raise capabilities[index]
            return capabilities[index]

        for name, value in {
            "is_available": lambda: True, "device_count": lambda: len(capabilities), "get_arch_list": lambda: [*built],
            "get_device_capability": capability, "get_device_name": lambda index: f"Card {index}",
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    return put


@pytest.fixture
def costs(monkeypatch):
    """What a product takes, by dtype."""

    def put(**seconds):
        monkeypatch.setattr(devices, "seconds", seconds.__getitem__)

    return put


AMX = {"float32": 8.0, "bfloat16": 1.0, "float16": 8.0, "float64": 20.0}
OLD = {"float32": 1.0, "bfloat16": 20.0, "float16": 12.0, "float64": 1.9}


@pytest.mark.parametrize("asked", ["cuda:7", "cuda:-1", "cpu:0", "meta", "xpu", "junk", "mps", "", "cuda:", "CPU"])
def test_a_device_that_is_not_there_is_one_sentence(asked):
    with pytest.raises(SetupError, match=r"^device='.*' for vae: this machine has cpu(; .*)?\. Choose one of them\.$"):
        Setup(devices={"vae": asked}).device_of("vae")


def test_why_there_is_no_cuda_is_said(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SetupError, match=r"has cpu; this torch \(.*\) is built without CUDA\. Choose"):
        Setup(device="cuda:0").device_of("vae")

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(
        SetupError, match=r"has cpu; The NVIDIA driver on your system is too old \(found version 11040\)"
    ):
        Setup(device="cuda").device_of("vae")


def test_why_there_is_no_mps_is_said(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    with pytest.raises(SetupError, match="this macOS is too old"):
        Setup(device="mps").device_of("vae")


def test_auto_takes_the_first_card_that_computes(cards):
    cards((6, 1), RuntimeError("CUDA error: no kernel image is available. Compile with"), (9, 0))
    setup = Setup()
    assert (setup.device_of("vae"), setup.dtype_of("transformer")) == ("cuda:2", "bfloat16")
    old, broken = setup.notes_of("transformer")
    assert old == (
        "cuda:0 is not used: Card 0 has compute capability 6.1, and this torch is built for sm_80, sm_90, compute_90"
    )
    assert broken == "cuda:1 is not used: CUDA error: no kernel image is available"
    assert Setup(device="cpu").notes_of("transformer") == []
    with pytest.raises(SetupError, match=r"this machine has cpu, cuda:2; Card 0 has compute capability 6\.1"):
        Setup(device="cuda").device_of("vae")


@pytest.mark.parametrize(
    ("capability", "built", "good"),
    [
        ((8, 9), ("sm_80",), True), ((8, 0), ("sm_86",), False), ((10, 0), ("sm_90", "compute_90"), True),
        ((12, 0), ("sm_90",), False), ((9, 0), ("sm_90a",), True), ((12, 0), ("sm_120",), True),
        ((9, 4), ("gfx90a", "gfx942"), True), ((7, 5), (), True),
    ],
)  # fmt: skip
def test_a_card_computes_what_torch_was_built_for(cards, capability, built, good):
    """A binary runs on later cards of one generation, what is compiled at first use on all later ones; names of AMD's
    cards are no such numbers."""
    cards(capability, built=built)
    assert (Setup().device_of("vae") == "cuda:0") == good


def test_a_machine_whose_cards_all_fail_computes_on_the_cpu(cards):
    cards((5, 0))
    assert (Setup().device_of("vae"), Setup().dtype_of("transformer")) == ("cpu", "float32")


def test_a_card_without_bfloat16_is_told_of(cards):
    cards((7, 5), built=("sm_75",))
    (text,) = Setup().notes_of("transformer")
    assert text == "cuda:0 (compute capability 7.5) has no bfloat16 and imitates it: dtype=float16 is faster"
    assert Setup(dtype="float16").notes_of("transformer") == Setup().notes_of("vae") == []


def test_apples_gpu_has_no_float64_and_bfloat16_only_of_late(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for late in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor, late=late: late)
        assert Setup().device_of("transformer") == "mps"
        assert Setup().dtype_of("transformer") == ("bfloat16" if late else "float32")
        with pytest.raises(SetupError, match=r"dtype='float64' for vae on mps: Apple's GPU does not have it\. Choose"):
            Setup(dtype="float64").dtype_of("vae")
    with pytest.raises(SetupError, match=r"does not have it before macOS 14\."):
        Setup(dtype="bfloat16").dtype_of("vae")
    assert Setup(dtype="float64", devices={"vae": "cpu"}).dtype_of("vae") == "float64"


def test_a_dtype_that_is_slow_on_this_cpu_is_told_of(costs):
    costs(**AMX)
    said = "float16 takes 8 times as long as bfloat16 on this CPU: {}=bfloat16 is faster"
    assert Setup(dtype="float16").notes_of("vae") == [said.format("dtype")]
    assert Setup(dtypes={"vae": "float16"}).notes_of("vae") == [said.format("dtypes.vae")]
    assert Setup(dtype="bfloat16").notes_of("vae") == Setup().notes_of("vae") == []
    costs(**OLD)
    for dtype, times in (("float16", 12), ("bfloat16", 20)):
        (text,) = Setup(dtype=dtype).notes_of("vae")
        assert text == f"{dtype} takes {times} times as long as float32 on this CPU: dtype=float32 is faster"
    assert Setup(dtype="float64").notes_of("vae") == [], "who asks for it knows"
    assert Setup(dtype="float16", backends={"text_encoder": "mlx"}).notes_of("text_encoder") == []


def test_seconds_are_measured_once():
    assert devices.seconds("float32") == devices.seconds("float32") > 0


@pytest.mark.slow
def test_it_is_said_before_anything_is_computed(costs, tmp_path, capsys, monkeypatch):
    """Once, however many parts it is true of; in a plan, in a run, to listeners and in the receipt."""
    costs(**AMX)
    monkeypatch.chdir(tmp_path)
    folder = tiny.write(tmp_path / "model")
    text, words = "float16 takes 8 times as long as bfloat16 on this CPU: dtype=bfloat16 is faster", ["a red circle"]
    words += ["--model", str(folder), "--dtype", "float16", "--steps", "1", "--width", "32", "--height", "32"]
    words += ["--frames", "5", "--guidance-scale", "1"]
    assert main(["plan", *words]) == 0
    assert " ".join(capsys.readouterr().out.split()).count(f"note: {text}") == 1
    assert main(["generate", *words, "--out", "x.npz", "--no-sheet", "--quiet"]) == 0
    assert capsys.readouterr().err.count(f"note: {text}\n") == 1
    heard = []
    pipe = ditkit.load(folder, dtype="float16", listeners=[lambda event: heard.append(event.name)])
    result = pipe("a", steps=1, width=32, height=32, frames=5, guidance_scale=1.0)
    assert result.receipt["noted"] == [{"text": text}]
    assert heard.count("setup.note") == 1
    assert heard.index("setup.note") < heard.index("stage.start")


def test_doctor_tells_of_cards_that_do_not_compute(cards, costs, capsys):
    from ditkit.cli import doctor

    cards((6, 1), (9, 0))
    costs(**AMX)
    rows = {what: (good, found) for good, (what, found) in doctor.hardware()}
    assert rows["device cuda:1"] == (True, "Card cuda:1")
    assert rows["device cuda:0"][0] is False
    assert "compute capability 6.1" in rows["device cuda:0"][1]
    assert rows["dtypes on the CPU"] == (True, "time of a product: float32 1, bfloat16 0.12, float16 1, float64 2.5")
