// Ask: a prompt, a chat or token ids; the score per pod, block by block, now or as of a past moment.
import { html } from "htm/preact";
import { useState } from "preact/hooks";
import { call, setToken } from "./api.js";
import { Problem, show, Table } from "./parts.js";

const TIERS = ["gpu", "cpu", "disk", "shared"];

function bodyOf(text) {
  const trimmed = text.trim();
  if (trimmed.startsWith("{") || trimmed.startsWith("[")) {
    const read = JSON.parse(trimmed);
    if (Array.isArray(read)) return typeof read[0] === "number" ? { tokens: read } : { messages: read };
    return read;
  }
  return { prompt: text };
}

export function Ask() {
  const [model, setModel] = useState("");
  const [text, setText] = useState("");
  const [at, setAt] = useState("");
  const [state, set] = useState({ busy: false, problem: null, now: null, then: null });
  async function ask(event) {
    event.preventDefault();
    set({ ...state, busy: true, problem: null });
    try {
      const body = { ...bodyOf(text), model: model || undefined };
      if (!model) body.model = bodyOf(text).model;
      const now = await call("ask", body);
      const then = at ? await call("ask", { ...body, at }) : null;
      set({ busy: false, problem: null, now, then });
    } catch (problem) {
      set({ busy: false, problem, now: null, then: null });
    }
  }
  return html`<h2>Ask</h2>
    <form onSubmit=${ask}>
      <label>Model <input name="model" value=${model} onInput=${(event) => setModel(event.target.value)} /><small>as clients spell it; a request body may name it itself</small></label>
      <label>Prompt <textarea name="prompt" value=${text} onInput=${(event) => setText(event.target.value)}></textarea><small>text, a list of chat messages, a list of token ids, or a request body as JSON</small></label>
      <div class="row">
        <label>As of, beside now <input name="at" placeholder="-10m" value=${at} onInput=${(event) => setAt(event.target.value)} /><small>for token ids; a moment as kvatlas at takes it</small></label>
        <label>Scorer token <input type="password" autocomplete="off" onInput=${(event) => setToken("scorer", event.target.value)} /><small>where the scorer asks for one</small></label>
      </div>
      <button class="do" disabled=${state.busy}>${state.busy ? "Asking …" : "Ask"}</button>
    </form>
    <${Problem} error=${state.problem} />
    ${state.now ? html`<${Answer} title="Now" scores=${state.now.score.scores} blocks=${state.now.explain ? state.now.explain.blocks : null} walks=${state.now.explain ? state.now.explain.walks : {}} note=${noteOf(state.now.score)} />` : null}
    ${state.then ? html`<${Answer} title=${`As of ${at}`} scores=${state.then.scores} blocks=${state.then.blocks} walks=${{}} note="" />` : null}
    ${state.now && state.then ? html`<${Differences} now=${state.now.score.scores} then=${state.then.scores} />` : null}`;
}

function noteOf(score) {
  const parts = [`${show(score.prompt_tokens)} tokens, ${show(score.blocks)} blocks of ${score.block_size_tokens}`];
  if (score.freshness && score.freshness.partial) parts.push("partial: some partitions did not answer");
  if (score.freshness && score.freshness.standby) parts.push("answered by a standby");
  return parts.join("; ");
}

function Answer({ title, scores, blocks, walks, note }) {
  const rows = Object.entries(scores).map(([pod, score]) => ({ key: pod, pod, ...score })).sort((a, b) => b.score - a.score);
  return html`<h3>${title}</h3>
    <p class="note">${note}</p>
    <${Table} label=${`Scores ${title}`} rows=${rows} empty="no pod holds the first block" columns=${[
      ["Pod", (row) => row.pod],
      ["Score", (row) => show(row.score), { number: true }],
      ["Matched tokens", (row) => show(row.matched_tokens), { number: true }],
      ["Matched blocks", (row) => show(row.matched_blocks), { number: true }],
      ["Suspect", (row) => show(row.suspect_blocks || 0), { number: true }],
      ["Why it ends there", (row) => (walks[row.pod] ? walks[row.pod].reason : "–")],
    ]} />
    ${blocks ? html`<${Blocks} blocks=${blocks} />` : html`<p class="note">Block by block needs the role explain.</p>`}`;
}

function Blocks({ blocks }) {
  const pods = [...new Set(blocks.flatMap((block) => block.holders.map((holder) => holder.pod)))].sort();
  const shown = blocks.slice(0, 2000);
  return html`<ul class="legend" aria-label="Colours">${[...TIERS, "suspect", "speculative"].map((name) => html`<li><span class=${`cell ${name}`}></span>${name}</li>`)}<li><span class="cell"></span>not held</li></ul>
    ${pods.map((pod) => {
      const cells = shown.map((block) => best(block.holders.filter((holder) => holder.pod === pod)));
      const held = cells.filter(Boolean).length;
      return html`<div key=${pod}><b>${pod}</b> <span class="note">${show(held)} of ${show(blocks.length)} blocks</span>
        <div class="strip" role="img" aria-label=${`${pod} holds ${held} of ${blocks.length} blocks`}>${cells.map((name, at) => html`<span class=${`cell ${name}`} title=${`block ${at}: ${name || "not held"}`}></span>`)}</div></div>`;
    })}
    ${blocks.length > shown.length ? html`<p class="note">the first ${shown.length} of ${blocks.length} blocks</p>` : null}`;
}

function best(holders) {
  const counted = holders.filter((holder) => holder.state !== "dead" && holder.state !== "gone" && holder.state !== "unknown-pod");
  if (counted.length === 0) return "";
  const tier = TIERS.find((name) => counted.some((holder) => holder.tier === name));
  const one = counted.find((holder) => holder.tier === tier) || counted[0];
  return one.state === "suspect" || one.state === "speculative" ? one.state : tier || "gpu";
}

function Differences({ now, then }) {
  const pods = [...new Set([...Object.keys(now), ...Object.keys(then)])].sort();
  const rows = pods.map((pod) => ({ key: pod, pod, now: now[pod]?.matched_tokens || 0, then: then[pod]?.matched_tokens || 0 }));
  return html`<h3>Then and now</h3>
    <${Table} label="Differences" rows=${rows} columns=${[
      ["Pod", (row) => row.pod],
      ["Tokens then", (row) => show(row.then), { number: true }],
      ["Tokens now", (row) => show(row.now), { number: true }],
      ["Change", (row) => `${row.now >= row.then ? "+" : "−"}${show(Math.abs(row.now - row.then))}`, { number: true }],
    ]} />`;
}
