"""The forward process in pictures, for which no network is needed: `python demo.py forward` and
`python demo.py schedules`."""
import numpy as np
from matplotlib.figure import Figure

import files
import tinyddpm as td

T = 1000


def first(args, name=None):
    """The first picture, or the first of this class: (1, H, W, C). A test picture if there is
    one, else one of training."""
    data = files.read(args.data, args.size)
    label = name and files.columns(data.names, [name])[0][0]
    for images, labels in (data.test_images, data.test_labels), (data.images, data.labels):
        if images is not None and name is not None:
            images = images[labels == label]
        if images is not None and len(images):
            return td.xp.asarray(images[:1])


def forward(args):
    """One picture on its way to noise, with its signal-to-noise ratio."""
    x0, diffusion = first(args, args.digit), td.Diffusion(td.SCHEDULES[args.schedule](T), "v")
    eps, steps = td.normal(args.seed, x0.shape), (1, 100, 250, 500, 750, T)
    print(f"{args.schedule} schedule\n{'t':>5}{'abar':>12}{'SNR':>12}")
    for t in steps:
        print(f"{t:5}{diffusion.abar[t]:12.4g}{diffusion.snr[t]:12.4g}")
    noisy = np.stack([td.asnumpy(diffusion.q_sample(x0, t, eps)) for t in steps], 1)
    heads = [f"t = {t}\nSNR {diffusion.snr[t]:.2g}" for t in steps]
    files.sheet(args.out / "forward.png", noisy, heads, cell=150)


def schedules(args):
    """Beta, alpha-bar and log-SNR of every schedule, and one picture under each."""
    x0 = first(args)
    eps, some, t = td.normal(args.seed, x0.shape), (200, 500, 800), np.arange(1, T + 1)
    betas = {name: schedule(T) for name, schedule in td.SCHEDULES.items()}
    betas["linear, zero SNR"] = td.zero_terminal_snr(td.linear_betas(T))
    figure = Figure((16, 6), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(3, 3, 3, 2.6))
    styles, noisy = ("-", "--", "-", "-", "--", "-", "-", "-.", ":"), []
    print(f"{'':18}" + "".join(f"{f'SNR({s})':>12}" for s in (*some, T)))
    for name, style in zip(betas, styles, strict=True):
        d = td.Diffusion(betas[name], "v")
        print(f"{name:18}" + "".join(f"{d.snr[s]:12.3g}" for s in (*some, T)))
        noisy.append([td.asnumpy(d.q_sample(x0, s, eps))[0] for s in some])
        with np.errstate(divide="ignore"):
            for ax, values in zip(axes, (d.beta, d.abar, np.log10(d.snr))):
                ax.plot(t, values[1:], style, lw=1.4, label=name)
    for ax, title in zip(axes, ("beta", "alpha-bar", "log10 SNR")):
        ax.set(title=title, xlabel="t")
        ax.grid(alpha=0.3)
    axes[0].set(yscale="log")
    axes[0].legend(fontsize=8)
    axes[2].set(ylim=(-6, 6))
    files.show(axes[3], np.array(noisy), [f"t = {s}" for s in some], [*betas])
    files.keep(figure, args.out / "schedules.png")
