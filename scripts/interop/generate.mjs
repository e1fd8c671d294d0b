// Generate text from a folder that is found under `base`; the same in Node and in a browser.
import { AutoModelForCausalLM, AutoTokenizer, env } from '@huggingface/transformers';

export async function generate(base, name, prompt, options = {}) {
    env.allowRemoteModels = false;
    env.allowLocalModels = true;
    env.localModelPath = base;
    env.useBrowserCache = false;
    const tokenizer = await AutoTokenizer.from_pretrained(name);
    // type of weights and external data are said by config.json
    const model = await AutoModelForCausalLM.from_pretrained(name, options);
    const given = tokenizer(prompt);
    const made = await model.generate({ ...given, max_new_tokens: 24, do_sample: false });
    const tokens = made.tolist()[0].map(Number);
    if (tokens.length <= given.input_ids.dims[1]) throw new Error('nothing was generated');
    return tokenizer.decode(tokens);
}
