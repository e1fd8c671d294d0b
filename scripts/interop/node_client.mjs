import { readFile } from 'node:fs/promises';
import path from 'node:path';
import process from 'node:process';
import { generate } from './generate.mjs';

const [folder, prompt, texts] = process.argv.slice(2);
try {
    const asked = texts ? JSON.parse(await readFile(texts, 'utf8')) : null;
    const made = await generate(path.dirname(folder), path.basename(folder), prompt, asked);
    if (asked) made.version += `, Node ${process.versions.node}`;
    console.log(asked ? JSON.stringify(made) : made);
} catch (error) {
    console.error(`Error: transformers.js in Node: ${error.message ?? error}`);
    process.exit(1);
}
