// What if: the recorded requests of a window through other routing policies.
import { html } from "htm/preact";
import { useState } from "preact/hooks";
import { call } from "./api.js";
import { Bar, Problem, show, Since, Table } from "./parts.js";

const POLICIES = ["recorded", "precise:1", "precise:4", "approximate:1", "round-robin", "random", "shared"];
const QUEUEING = ["kvatlas:1", "kvatlas:4", "load-only", "approximate", "dynamo:1", "llm-d:1", "round-robin", "random"];

const toggled = (chosen, name) => {
  const next = new Set(chosen);
  next.has(name) ? next.delete(name) : next.add(name);
  return next;
};

export function WhatIf() {
  const [chosen, setChosen] = useState(new Set(["recorded", "precise:1", "round-robin", "shared"]));
  const [queued, setQueued] = useState(new Set(["kvatlas:1", "round-robin"]));
  const [since, setSince] = useState("-1h");
  const [until, setUntil] = useState("latest");
  const [blocks, setBlocks] = useState(2048);
  const [state, set] = useState({ busy: false, answer: null, problem: null });
  async function run(event) {
    event.preventDefault();
    set({ busy: true, answer: null, problem: null });
    try {
      const pick = (all, from) => all.filter((name) => from.has(name));
      const answer = await call("what-if", { policies: pick(POLICIES, chosen), queueing: pick(QUEUEING, queued), since, until, blocks });
      set({ busy: false, answer, problem: null });
    } catch (problem) {
      set({ busy: false, answer: null, problem });
    }
  }
  const boxes = (title, all, from, setFrom) => html`<fieldset class="row"><legend>${title}</legend>${all.map((name) => html`<label class="box"><input type="checkbox" checked=${from.has(name)} onChange=${() => setFrom(toggled(from, name))} /> ${name}</label>`)}</fieldset>`;
  const { answer } = state;
  return html`<h2>What if</h2>
    <form onSubmit=${run}>
      ${boxes("Hit ratio of", POLICIES, chosen, setChosen)}
      ${boxes("Time to first token, in a fleet with queues, of", QUEUEING, queued, setQueued)}
      <div class="row">
        <${Since} label="Requests since" value=${since} set=${setSince} />
        <label>Until <select value=${until} onChange=${(event) => setUntil(event.target.value)}>${["latest", "-5m", "-15m", "-1h", "-6h"].map((text) => html`<option value=${text}>${text === "latest" ? "now" : `${text.slice(1)} ago`}</option>`)}</select></label>
        <label>Blocks in a pod's cache <input type="number" min="1" value=${blocks} onInput=${(event) => setBlocks(Number(event.target.value))} /></label>
      </div>
      <button class="do" disabled=${state.busy || chosen.size + queued.size === 0}>${state.busy ? "Simulating …" : "Simulate"}</button>
    </form>
    <${Problem} error=${state.problem} />
    ${answer ? html`<p class="note">${show(answer.requests)} requests, ${show(answer.pods)} pods${answer.skipped ? `; ${show(answer.skipped)} left out: no keys, or of another block size` : ""}</p>
      ${answer.rows.length ? html`<h3>Hit ratio</h3><${Table} label="Policies" rows=${answer.rows.map((row) => ({ ...row, key: row.policy }))} columns=${[
        ["Policy", (row) => row.policy],
        ["Requests", (row) => show(row.requests), { number: true }],
        ["Hit ratio", (row) => html`<${Bar} share=${row.hit_ratio} text=${`${show(100 * row.hit_ratio)} %`} />`, { number: true }],
        ["Balance", (row) => show(row.balance), { number: true }],
        ["Recomputed", (row) => show(row.recomputed_tokens, "tokens"), { number: true }],
      ]} />` : null}
      ${answer.first_tokens.length ? html`<h3>Time to first token</h3><${Table} label="First tokens" rows=${answer.first_tokens.map((row) => ({ ...row, key: `${row.policy}:${row.replicas}` }))} columns=${[
        ["Policy", (row) => row.key],
        ["Mean", (row) => html`<${Bar} share=${row.mean_ms / Math.max(...answer.first_tokens.map((one) => one.mean_ms))} text=${show(row.mean_ms, "ms")} />`, { number: true }],
        ["p50", (row) => show(row.p50_ms, "ms"), { number: true }],
        ["p90", (row) => show(row.p90_ms, "ms"), { number: true }],
        ["p99", (row) => show(row.p99_ms, "ms"), { number: true }],
        ["Hit ratio", (row) => `${show(100 * row.hit_ratio)} %`, { number: true }],
        ["Requests/s", (row) => show(row.requests_per_second), { number: true }],
        ["Balance", (row) => show(row.balance), { number: true }],
      ]} />` : null}` : null}`;
}
