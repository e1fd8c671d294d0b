import path from 'node:path';
import process from 'node:process';
import { generate } from './generate.mjs';

const [folder, prompt] = process.argv.slice(2);
try {
    console.log(await generate(path.dirname(folder), path.basename(folder), prompt));
} catch (error) {
    console.error(`Error: transformers.js in Node: ${error.message ?? error}`);
    process.exit(1);
}
