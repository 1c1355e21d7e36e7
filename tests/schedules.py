"""Every kind of noise schedule, as the tests use them."""

from diffusers import DDIMScheduler

from glassflows import RectifiedFlow, VarianceExploding, VariancePreserving

TABLES = {
    "linear": DDIMScheduler().alphas_cumprod,
    "scaled_linear": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod,
    "cosine": DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod,
    "zero_terminal_snr": DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod,
}
SCHEDULES = {
    "flow": RectifiedFlow(),
    **{name: VariancePreserving(table.double().tolist()) for name, table in TABLES.items()},
    "exploding": VarianceExploding(),
}
