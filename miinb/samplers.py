"""What the A1111 web UI and its readers call samplers, and diffusers' classes that compute the same."""

from __future__ import annotations

#: A1111's own names, without the noise schedule.
_A1111 = {
    "Euler": "EulerDiscreteScheduler",
    "Euler a": "EulerAncestralDiscreteScheduler",
    "DDIM": "DDIMScheduler",
    "PLMS": "PNDMScheduler",
    "LMS": "LMSDiscreteScheduler",
    "Heun": "HeunDiscreteScheduler",
    "DPM2": "KDPM2DiscreteScheduler",
    "DPM2 a": "KDPM2AncestralDiscreteScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "DPM++ SDE": "DPMSolverSDEScheduler",
    "UniPC": "UniPCMultistepScheduler",
}
#: All names that are known, in small letters.
SAMPLERS = {name.lower(): scheduler for name, scheduler in _A1111.items()} | {
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "dpm++ 2s": "DPMSolverSinglestepScheduler",
    "deis": "DEISMultistepScheduler",
}
#: Samplers that none of the offered classes computes, and the class that is most like them; "": none is.
_WITHOUT = {
    "dpm++ 2m sde": "DPMSolverMultistepScheduler",
    "dpm++ 2m sde heun": "DPMSolverMultistepScheduler",
    "dpm++ 3m sde": "DPMSolverMultistepScheduler",
    "dpm++ 2s a": "DPMSolverSinglestepScheduler",
    "ddim cfg++": "DDIMScheduler",
    "euler cfg++": "EulerDiscreteScheduler",
    "euler a cfg++": "EulerAncestralDiscreteScheduler",
    "dpm fast": "",
    "dpm adaptive": "",
    "restart": "",
    "lcm": "",
}
_SCHEDULES = (
    *("karras", "exponential", "polyexponential", "automatic", "uniform", "sgm uniform", "beta", "simple", "normal"),
    *("kl optimal", "align your steps", "align your steps gits", "align your steps 11", "align your steps 32", "ays"),
    *("ddim", "ddim uniform", "turbo", "linear quadratic"),
)
#: Schedules that are a class's own; "Automatic" is, but for the DPM family.
_OWN_SCHEDULES = ("", "uniform", "automatic")


def scheduler_of(name: str, schedule: str = "") -> tuple[str, list[str]]:
    """diffusers' class for a sampler's name, "" where there is none; and notes on what is not taken over.

    Args:
        name: "DPM++ 2M Karras", "Euler a"; a class of diffusers is its own.
        schedule: the noise schedule, where it is told beside the name: "Karras".
    """
    if name.endswith("Scheduler"):
        return name, []
    plain = " ".join(name.lower().split())
    known = sorted((*SAMPLERS, *_WITHOUT), key=len, reverse=True)
    short = next((one for one in known if plain == one or plain.startswith(one + " ")), "")
    ending = plain.removeprefix(short).strip()
    told, notes = repr(name[:40]), []
    if ending and ending not in _SCHEDULES:
        notes = [f"Of the sampler {told} only {name.strip()[: len(short)]!r} is known here."]
        ending = ""
    own = ending or schedule.strip().lower()
    if short in _WITHOUT:
        hint = f"; {_WITHOUT[short]} is most like it" if _WITHOUT[short] else ""
        return "", [f"No scheduler here computes what the sampler {told} does: the model's own is taken{hint}."]
    if short not in SAMPLERS:
        return "", [f"The sampler {told} is not known here: the model's own is taken."]
    if own not in _OWN_SCHEDULES or (own == "automatic" and short.startswith("dpm")):
        which = f" ({schedule.strip()[:40]})" if not ending else ""
        notes.append(f"Of the sampler {told} the noise schedule{which} is not taken over.")
    return SAMPLERS[short], notes


def sampler_of(scheduler: str) -> str:
    """What A1111 calls a class of diffusers; the class's own name where it has none."""
    return next((name for name, one in _A1111.items() if one == scheduler), scheduler)
