// One measurement with llama.cpp's prebuilt library of the npm package node-llama-cpp: `node llama_cpp.mjs SPEC.json`, the same
// SPEC and answer as benchmarks/engines.py. Nothing is built or fetched: `build: "never"`.
import {readFileSync, writeFileSync} from "node:fs";
import {performance} from "node:perf_hooks";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

process.on("uncaughtException", (error) => {
    console.error(String(error)); // the last line is what a reader is told
    process.exit(1);
});
const spec = JSON.parse(readFileSync(process.argv[2], "utf8"));
const {getLlama} = await import(pathToFileURL(join(spec.package, "dist", "index.js")).href);
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, maxThreads: spec.threads, logLevel: "warn"});
const base = memory();
const model = await llama.loadModel({modelPath: spec.path});
const context = await model.createContext({
    sequences: Math.max(...spec.jobs.map((job) => job.prompts.length)),
    contextSize: Math.max(...spec.jobs.map((job) => job.prompts[0].length + job.new)),
    batchSize: 512, // llama-bench's n_ubatch
    threads: {ideal: spec.threads, min: spec.threads},
    ignoreMemorySafetyChecks: true
});
const sequences = Array.from({length: context.totalSequences}, () => context.getSequence());
const jobs = [];
for (const job of spec.jobs)
    jobs.push(await generate(job.prompts, job.new));
const info = {version: `node-llama-cpp, llama.cpp ${llama.llamaCppRelease?.release}`, threads: context.currentThreads};
writeFileSync(spec.output, JSON.stringify({base, jobs, info}));
process.exit(0); // frees at once

// The most likely next tokens, as many as told, of each prompt; seconds to the first, and from there to the last.
async function generate(prompts, count) {
    const tokens = prompts.map(() => []);
    const marks = [performance.now()];
    let inputs = prompts;
    for (let step = 0; step < count; step++) {
        inputs = await Promise.all(inputs.map((ids, i) => next(sequences[i], ids)));
        inputs.forEach(([token], i) => tokens[i].push(token));
        marks.push(performance.now());
    }
    for (const sequence of sequences)
        await sequence.clearHistory();
    return {tokens, first: (marks[1] - marks[0]) / 1000, rest: (marks[count] - marks[1]) / 1000};
}

async function next(sequence, ids) {
    const input = [...ids.slice(0, -1), [ids.at(-1), {generateNext: {token: true, options: {temperature: 0}}}]];
    const found = await sequence.controlledEvaluate(input);
    return [found.at(-1).next.token];
}

function memory() {
    const status = readFileSync("/proc/self/status", "ascii");
    const bytes = (name) => 1024 * Number(status.match(new RegExp(`^${name}:\\s+(\\d+)`, "m"))[1]);
    return {anonymous: bytes("RssAnon"), resident: bytes("VmRSS")};
}
