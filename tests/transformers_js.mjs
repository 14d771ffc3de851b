// node transformers_js.mjs REQUEST ANSWER: what transformers.js makes of a folder, without a network.
//
// REQUEST holds library, folder, dtype, texts and pictures (paths) as JSON; ANSWER gets the vectors and the logits.

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const { library, folder, dtype, texts, pictures } = JSON.parse(readFileSync(process.argv[2], "utf-8"));
const file = createRequire(`${library}/package.json`).resolve("@huggingface/transformers").replace(".cjs", ".mjs");
const js = await import(pathToFileURL(file));
js.env.allowRemoteModels = false;
js.env.localModelPath = "";

const open = (kind) => kind.from_pretrained(folder, { dtype });
const tokens = (await open(js.AutoTokenizer))(texts, { padding: true, truncation: true });
const processor = await open(js.AutoProcessor);
const { pixel_values } = await processor(await Promise.all(pictures.map((path) => js.RawImage.read(path))));
const { text_embeds } = await (await open(js.CLIPTextModelWithProjection))(tokens);
const { image_embeds } = await (await open(js.CLIPVisionModelWithProjection))({ pixel_values });
const whole = await (await open(js.ChineseCLIPModel))({ ...tokens, pixel_values });
const classify = await js.pipeline("zero-shot-image-classification", folder, { dtype });
const labels = await classify(pictures[0], texts.slice(0, 3), { hypothesis_template: "{}" });
const answer = { token_ids: tokens.input_ids.tolist().map((row) => row.map(Number)), labels };
const tensors = { text_embeds, image_embeds, whole_text: whole.text_embeds, whole_image: whole.image_embeds };
for (const [name, one] of Object.entries({ ...tensors, logits: whole.logits_per_image })) answer[name] = one.tolist();
writeFileSync(process.argv[3], JSON.stringify(answer));
