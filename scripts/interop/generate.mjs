// Generate text from a folder that is found under `base`; the same in Node and in a browser.
import { AutoModelForCausalLM, AutoTokenizer, env } from '@huggingface/transformers';

// Gives the text, or with a list of texts what the benchmark of clients compares.
export async function generate(base, name, prompt, texts = null, options = {}) {
    env.allowRemoteModels = false;
    env.allowLocalModels = true;
    env.localModelPath = base;
    env.useBrowserCache = false;
    const tokenizer = await AutoTokenizer.from_pretrained(name);
    // type of weights and external data are said by config.json
    const model = await AutoModelForCausalLM.from_pretrained(name, options);
    const given = tokenizer(prompt);
    const all = await model.generate({ ...given, max_new_tokens: 24, do_sample: false });
    const tokens = all.tolist()[0].map(Number);
    const start = given.input_ids.dims[1];
    if (tokens.length <= start) throw new Error('nothing was generated');
    const text = tokenizer.decode(tokens);
    if (texts === null) return text;
    return {
        version: env.version,
        given: tokens.slice(0, start),
        made: tokens.slice(start),
        text,
        ids: texts.map((t) => tokenizer.encode(t, { add_special_tokens: false }).map(Number)),
    };
}
