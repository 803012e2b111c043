"""What the A1111 web UI and its readers call samplers, and diffusers' classes that compute the same."""

from __future__ import annotations

#: The words of their names without the noise schedule, in small letters.
SAMPLERS = {
    "euler": "EulerDiscreteScheduler",
    "euler a": "EulerAncestralDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "plms": "PNDMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2 a": "KDPM2AncestralDiscreteScheduler",
    "dpm++ 2m": "DPMSolverMultistepScheduler",
    "dpm++ sde": "DPMSolverSinglestepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
}
#: Samplers that none of the offered classes computes, and the class that is most like them; "": none is.
_WITHOUT = {
    "dpm++ 2m sde": "DPMSolverMultistepScheduler",
    "dpm++ 2m sde heun": "DPMSolverMultistepScheduler",
    "dpm++ 3m sde": "DPMSolverMultistepScheduler",
    "dpm++ 2s a": "DPMSolverSinglestepScheduler",
    "ddim cfg++": "DDIMScheduler",
    "dpm fast": "",
    "dpm adaptive": "",
    "restart": "",
    "lcm": "",
}
_SCHEDULES = (" karras", " exponential", " polyexponential", " automatic", " uniform", " sgm uniform")
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
    ending = next((end for end in sorted(_SCHEDULES, key=len, reverse=True) if plain.endswith(end)), "")
    short, own = plain.removesuffix(ending), (ending.strip() or schedule.strip().lower())
    told = repr(name[:40])
    if short in _WITHOUT:
        hint = f"; {_WITHOUT[short]} is most like it" if _WITHOUT[short] else ""
        return "", [f"No scheduler here computes what the sampler {told} does: the model's own is taken{hint}."]
    if short not in SAMPLERS:
        return "", [f"The sampler {told} is not known here: the model's own is taken."]
    if own not in _OWN_SCHEDULES or (own == "automatic" and short.startswith("dpm")):
        which = f" ({schedule.strip()[:40]})" if not ending else ""
        return SAMPLERS[short], [f"Of the sampler {told} the noise schedule{which} is not taken over."]
    return SAMPLERS[short], []
