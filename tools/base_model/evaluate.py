"""Measures emoji64 as it is shipped: are the pictures what the prompts ask for?

An independent classifier (classifier.py) names every generated picture; the background is read off the
picture's rim. Writes evaluation.json and the contact sheet samples.png beside the model.
"""

import argparse
import json
import os

import classifier
import emoji_data as data
import make_blueprint
import numpy as np
import torch
import train_vae
from export import load_denoiser, load_text_encoder, load_vae
from PIL import Image, ImageDraw, ImageFont
from style_score import style_score

import networks

COLORS = list(data.BACKGROUNDS)


class Model:
    """The four shipped parts, ready to draw."""

    def __init__(self, folder):
        path = lambda part: os.path.join(folder, part + ".safetensors")
        self.denoiser, self.vae = load_denoiser(path("denoiser")), load_vae(path("vae"))
        self.encoder = load_text_encoder(path("text_encoder"))
        self.tokenizer = networks.load_tokenizer(os.path.join(folder, "tokenizer"))

    def states(self, captions):
        ids, lengths = networks.tokenize(self.tokenizer, captions)
        return networks.text_states(self.encoder, ids), lengths

    @torch.no_grad()
    def draw(self, captions, seed, steps, cfg, shift):
        """One uint8 picture per caption; picture i starts from the noise of seed + i."""
        out = []
        for start in range(0, len(captions), 32):
            part = captions[start : start + 32]
            noise = torch.stack(
                [
                    torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(seed + start + i))
                    for i in range(len(part))
                ]
            )
            latents = networks.sample(self.denoiser, *self.states(part), self.states([""]), noise, steps, cfg, shift)
            out.append(self.decode(latents))
        return np.concatenate(out)

    @torch.no_grad()
    def decode(self, latents):
        pixels = train_vae.decode(self.vae, latents).clamp(-1, 1)
        return ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()

    @torch.no_grad()
    def psnr(self, pictures):
        """How well the VAE gives back these uint8 pictures, in dB."""
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return train_vae.psnr(train_vae.decode(self.vae, train_vae.encode(self.vae, pixels)), pixels)


def rim_color(picture):
    """The named background nearest to the median colour of the outermost two pixels."""
    rim = np.concatenate(
        [
            picture[:2].reshape(-1, 3),
            picture[-2:].reshape(-1, 3),
            picture[:, :2].reshape(-1, 3),
            picture[:, -2:].reshape(-1, 3),
        ]
    )
    median = np.median(rim, 0)
    return min(COLORS, key=lambda name: np.abs(median - np.array(data.BACKGROUNDS[name])).sum())


def prompts(per_class):
    """(class, color, caption) of every class on `per_class` backgrounds, in changing wording."""
    rng, out = np.random.default_rng(5), []
    for i, name in enumerate(data.CLASSES):
        for k in range(per_class):
            color = COLORS[(i + 2 * k + k // 3) % len(COLORS)]
            out.append((name, color, data.TEMPLATES[rng.integers(len(data.TEMPLATES))].format(name=name, color=color)))
    return out


def judge_pictures(model, net, args):
    """Accuracy of classes and backgrounds over `prompts`, and the pictures."""
    asked = prompts(args.per_class)
    drawn = model.draw([caption for _, _, caption in asked], args.seed, args.steps, args.cfg, args.shift)
    seen = classifier.classify(net, drawn)
    right = np.array([name == guess for (name, _, _), guess in zip(asked, seen)])
    colors = np.mean([rim_color(picture) == color for (_, color, _), picture in zip(asked, drawn)])
    share = {name: np.mean([r for (n, _, _), r in zip(asked, right) if n == name]) for name in data.CLASSES}
    return (
        {
            "prompts": len(asked),
            "class_accuracy": round(float(right.mean()), 4),
            "background_accuracy": round(float(colors), 4),
            "classes_below_half": sorted(name for name, value in share.items() if value < 0.5),
        },
        asked,
        drawn,
    )


def judge_drawings(model, net, args):
    """The other kind of caption, and what the base model makes of a style it does not know."""
    names = list(data.CLASSES)
    sketches = model.draw([f"a line drawing of a {n}" for n in names], args.seed, args.steps, args.cfg, args.shift)
    unknown = model.draw([f"blueprint of a {n}" for n in names], args.seed, args.steps, args.cfg, args.shift)
    hits = [np.mean([a == b for a, b in zip(names, classifier.classify(net, part))]) for part in (sketches, unknown)]
    return {
        "line_drawing_class_accuracy": round(float(hits[0]), 4),
        "blueprint_prompt_class_accuracy": round(float(hits[1]), 4),
        "blueprint_prompt_style_score": round(float(np.mean([style_score(p) for p in unknown])), 4),
        "blueprint_data_style_score": round(
            float(np.mean([style_score(make_blueprint.blueprint(n)) for n in names])), 4
        ),
    }


def judge_vae(model):
    """PSNR in dB on placements that were not trained on."""
    rng, names = np.random.default_rng(777), list(data.CLASSES)
    return {
        "vae_psnr_pictures": round(model.psnr([data.render(n, COLORS[i % 6], rng) for i, n in enumerate(names)]), 2),
        "vae_psnr_line_drawings": round(model.psnr([data.render_sketch(n, rng) for n in names]), 2),
        "vae_psnr_blueprints": round(model.psnr([make_blueprint.blueprint(n, rng) for n in names]), 2),
    }


def contact_sheet(asked, drawn, path, columns=10, rows=8, cell=112):
    """Pictures with their prompts below, evenly chosen over all classes."""
    chosen = np.linspace(0, len(asked) - 1, columns * rows).round().astype(int)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + 26)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for place, index in enumerate(chosen):
        x, y = place % columns * cell, place // columns * (cell + 26)
        sheet.paste(Image.fromarray(drawn[index]).resize((cell - 4, cell - 4), Image.BICUBIC), (x + 2, y + 2))
        words = asked[index][2].split()
        half = next(i for i in range(len(words) + 1) if len(" ".join(words[: i + 1])) > 19 or i == len(words))
        pen.text(
            (x + 3, y + cell - 2),
            " ".join(words[:half]) + "\n" + " ".join(words[half:]),
            fill="black",
            font=font,
            spacing=1,
        )
    sheet.save(path, optimize=True)


def main(args):
    model, net = Model(args.folder), classifier.train(args.classifier)
    result = {
        "settings": {"sampler": "euler", "steps": args.steps, "cfg": args.cfg, "shift": args.shift, "seed": args.seed},
        "classes": len(data.CLASSES),
        "classifier_held_out_accuracy": round(classifier.held_out(net, False), 4),
        "classifier_held_out_accuracy_drawings": round(classifier.held_out(net, True), 4),
    }
    part, asked, drawn = judge_pictures(model, net, args)
    result.update(part)
    if not args.quick:
        result.update(judge_drawings(model, net, args), **judge_vae(model))
        contact_sheet(asked, drawn, os.path.join(args.folder, "samples.png"))
        with open(os.path.join(args.folder, "evaluation.json"), "w") as out:
            json.dump(result, out, indent=2)
            out.write("\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="models/emoji64")
    parser.add_argument(
        "--classifier", default="classifier.pt", help="the judge's weights, trained in a minute if missing"
    )
    parser.add_argument("--per-class", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--cfg", type=float, default=3.5)
    parser.add_argument("--shift", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="class and background accuracy only, nothing written")
    torch.set_num_threads(2)
    main(parser.parse_args())
