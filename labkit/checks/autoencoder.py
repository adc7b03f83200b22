"""Exercises of notebook 03: what is saved, what the encoder says, the price of saying it, the scale factor, and a measure of what is lost.

    numbers per latent = (H / f)(W / f) C                                     Rombach et al. 2022, section 3.1
    z = mu + exp(logvar / 2) noise                                            Kingma & Welling 2013, section 2.4
    KL(q || N(0, I)) = 1/2 sum (mu^2 + sigma^2 - 1 - log sigma^2)             ibid., appendix B
    scale = 1 / std(z)                                                        Rombach et al. 2022, appendix G
    PSNR = -10 log10 mean (x - y)^2,   pictures in [0, 1]
"""

import torch
from torch import Tensor

from labkit.checks.check import Check, seeded
from labkit.models.vae import DiagonalGaussian

times_smaller = Check(
    "times_smaller",
    reference=lambda height, width, f, channels: 3 * height * width / (height // f * (width // f) * channels),
    wrong={
        "You compared with the number of pixels; each pixel is three values, red, green and blue.": lambda h, w, f, c: h * w / (h // f * (w // f) * c),
        "A latent has several channels: divide by `channels` too.": lambda h, w, f, c: 3 * h * w / (h // f * (w // f)),
        "The side shrinks by f, so the area shrinks by $f^2$.": lambda h, w, f, c: 3 * h * w / (h * w / f * c),
        "That is $f^2$, the ratio of places; the numbers at each place differ too, three and `channels`.": lambda h, w, f, c: float(f * f),
        "The fraction is upside down.": lambda h, w, f, c: h // f * (w // f) * c / (3 * h * w),
        "That is the figure for $f=8$ and 4 channels only; the arguments say what this autoencoder has.": lambda h, w, f, c: 48.0,
    },
    task="`times_smaller` says how many times fewer numbers a latent has than the picture: the picture has 3 for each pixel, the latent `channels` for each of its places.",
    praise="for a picture of 512 x 512, f = 8 and 4 channels: 786,432 numbers become 16,384.",
    cases=lambda: [(512, 512, 8, 4), (256, 128, 4, 3), (64, 64, 16, 16)],
)


def _posteriors():
    return [(seeded(3, 4, 2, 2, seed=n), 1.5 * seeded(3, 4, 2, 2, seed=20 + n) - shift) for n, shift in enumerate((0.0, 4.0))]


def _each(value: Tensor) -> Tensor:
    return value.flatten(1).sum(1)


kl = Check(
    "kl",
    reference=lambda mean, logvar: DiagonalGaussian(mean, logvar).kl(),
    wrong={
        "The ½ is missing.": lambda m, v: _each(m**2 + v.exp() - 1 - v),
        "You averaged over the latent; the KL of independent numbers is the *sum* of theirs.": lambda m, v: 0.5 * (m**2 + v.exp() - 1 - v).flatten(1).mean(1),
        "You summed over the whole batch; there is one KL for each picture.": lambda m, v: 0.5 * (m**2 + v.exp() - 1 - v).sum(),
        "The sign of $\\log\\sigma^2$: it is subtracted.": lambda m, v: 0.5 * _each(m**2 + v.exp() - 1 + v),
        "`logvar` is $\\log\\sigma^2$ already: $\\sigma^2$ is its exponential, and you used `logvar` itself as $\\sigma^2$.": lambda m, v: (
            0.5 * _each(m**2 + v - 1 - v.abs().log())),
        "`logvar` is $\\log\\sigma^2$, not $\\log\\sigma$: you squared $\\sigma^2$.": lambda m, v: 0.5 * _each(m**2 + (2 * v).exp() - 1 - 2 * v),
        "You squared $\\sigma^2$: the exponential of `logvar` is the variance, not its root.": lambda m, v: 0.5 * _each(m**2 + (2 * v).exp() - 1 - v),
        "The -1 is missing: the KL must be zero where $\\mu=0$ and $\\sigma=1$.": lambda m, v: 0.5 * _each(m**2 + v.exp() - v),
        "The mean is not squared.": lambda m, v: 0.5 * _each(m + v.exp() - 1 - v),
        "That is minus the KL: a KL is never negative.": lambda m, v: -0.5 * _each(m**2 + v.exp() - 1 - v),
    },
    task="`kl` returns one number for each picture, (B,): equation (2), summed over everything but the batch. `logvar` is $\\log\\sigma^2$.",
    praise="in nats; divide by $\\ln 2$ for bits. It is zero only where the encoder says nothing at all.",
    cases=_posteriors,
)

sample = Check(
    "sample",
    reference=lambda mean, logvar, noise: DiagonalGaussian(mean, logvar).sample(noise),
    wrong={
        "You multiplied by $\\sigma^2$; the noise takes $\\sigma=\\exp(\\tfrac12\\log\\sigma^2)$.": lambda m, v, n: m + v.exp() * n,
        "You multiplied by the logarithm itself: an exponential is missing.": lambda m, v, n: m + v * n,
        "That is the mean: no noise in it.": lambda m, v, n: m.clone(),
        "That is $\\exp(-\\tfrac12\\log\\sigma^2)=1/\\sigma$: the sign in the exponent.": lambda m, v, n: m + (-v / 2).exp() * n,
        "The mean is missing.": lambda m, v, n: (v / 2).exp() * n,
        "You used $\\sqrt{\\log\\sigma^2}$; the root of the variance is $\\exp(\\tfrac12\\log\\sigma^2)$.": lambda m, v, n: m + v.abs().sqrt() * n,
        "The spread is missing: noise of size one, whatever the encoder said.": lambda m, v, n: m + n,
        "You multiplied all of it by the noise; the mean stands by itself.": lambda m, v, n: (m + (v / 2).exp()) * n,
        "Mean and noise have changed places: the spread multiplies the *noise*.": lambda m, v, n: n + (v / 2).exp() * m,
        "The noise is subtracted. The distribution is the same, the sample is not: equation (1) adds it.": lambda m, v, n: m - (v / 2).exp() * n,
    },
    task="`sample` draws a latent from what the encoder says: the mean plus the standard deviation times the noise, equation (1).",
    praise="the randomness comes from outside, so gradients flow through mean and spread: the reparametrisation trick.",
    cases=lambda: [(*pair, seeded(3, 4, 2, 2, seed=40 + n)) for n, pair in enumerate(_posteriors())],
)

scale_factor = Check(
    "scale_factor",
    reference=lambda z: 1 / z.std(correction=0),
    wrong={
        "That is the standard deviation; the factor is one over it, so that the product has spread one.": lambda z: z.std(correction=0),
        "That is one over the *variance*; the factor multiplies latents, not their squares.": lambda z: 1 / z.var(correction=0),
        "You took one factor for each channel. Stable Diffusion has a single number for all of them (some later models have one each).": lambda z: (
            1 / z.std(dim=(0, 2, 3), correction=0)),
        "That is one over the root mean square; the mean has to be taken off first, or a shifted latent counts as a wide one.": lambda z: 1 / z.square().mean().sqrt(),
        "That is one over the mean size; the convention is the standard deviation.": lambda z: 1 / z.abs().mean(),
        "That is one over the largest value; one outlier would decide it.": lambda z: 1 / z.abs().max(),
        "You looked at the first picture alone; the spread is that of all of them.": lambda z: 1 / z[0].std(),
        "That is Stable Diffusion's own number; here it is to be measured.": lambda z: torch.tensor(0.18215, dtype=z.dtype),
    },
    task="`scale_factor` is given latents of many pictures, (B, C, h, w), and returns the one number that makes their standard deviation 1, equation (3).",
    praise="a number measured on data, not a constant of nature: with another VAE it is another one.",
    cases=lambda: [(3 * seeded(4, 4, 5, 5) + 1.0,), (0.2 * seeded(4, 4, 4, 4, seed=1) + torch.tensor([0.0, 1.0, -1.0, 0.5]).view(1, 4, 1, 1).double(),)],
    tolerance=0.008,  # with or without Bessel's correction
)


def _pictures():
    return [(seeded(2, 3, 6, 6, seed=n).sigmoid(), (seeded(2, 3, 6, 6, seed=n) + size * seeded(2, 3, 6, 6, seed=9)).sigmoid()) for n, size in enumerate((0.1, 0.6))]


def _mse(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().flatten(1).mean(1)


psnr = Check(
    "psnr",
    reference=lambda x, y: -10 * _mse(x, y).log10(),
    wrong={
        "The sign: a good copy has a *high* PSNR.": lambda x, y: 10 * _mse(x, y).log10(),
        "That is the natural logarithm; decibels have the decimal one.": lambda x, y: -10 * _mse(x, y).log(),
        "You took 20 times the logarithm of the *mean square*; 20 belongs to its root.": lambda x, y: -20 * _mse(x, y).log10(),
        "You averaged the absolute error; PSNR has the squared one.": lambda x, y: -10 * (x - y).abs().flatten(1).mean(1).log10(),
        "That is the formula for values from 0 to 255; these go from 0 to 1, and the peak is 1.": lambda x, y: 10 * (255**2 / _mse(x, y)).log10(),
        "That is the formula for values from -1 to 1, whose peak-to-peak is 2; these go from 0 to 1.": lambda x, y: 10 * (4 / _mse(x, y)).log10(),
        "That is one number for all pictures; take one for each, and average afterwards if you must.": lambda x, y: -10 * (x - y).square().mean().log10(),
        "You summed the squares; it is their mean, or a larger picture would count as a worse copy.": lambda x, y: -10 * (x - y).square().flatten(1).sum(1).log10(),
        "You squared the mean of the differences, where plus and minus cancel: square first, then take the mean.": lambda x, y: (
            -10 * (x - y).flatten(1).mean(1).square().log10()),
    },
    task="`psnr` returns for each pair of pictures in [0, 1] the peak signal-to-noise ratio in decibels, (B,), equation (4).",
    praise="plus 10 dB is a tenth of the squared error.",
    cases=_pictures,
)
