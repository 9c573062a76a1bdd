// What if: the recorded requests through other routing policies.
import { html } from "htm/preact";
import { useState } from "preact/hooks";
import { call } from "./api.js";
import { Problem, show, Table } from "./parts.js";

const POLICIES = ["recorded", "precise:1", "precise:4", "approximate:1", "round-robin", "random", "shared"];

export function WhatIf() {
  const [chosen, setChosen] = useState(new Set(["recorded", "precise:1", "round-robin", "shared"]));
  const [minutes, setMinutes] = useState(60);
  const [blocks, setBlocks] = useState(2048);
  const [state, set] = useState({ busy: false, rows: null, problem: null });
  function toggle(name) {
    const next = new Set(chosen);
    next.has(name) ? next.delete(name) : next.add(name);
    setChosen(next);
  }
  async function run(event) {
    event.preventDefault();
    set({ busy: true, rows: null, problem: null });
    try {
      const answer = await call("what-if", { policies: POLICIES.filter((name) => chosen.has(name)), minutes, blocks });
      set({ busy: false, rows: answer.rows.map((row) => ({ ...row, key: row.policy })), problem: null });
    } catch (problem) {
      set({ busy: false, rows: null, problem });
    }
  }
  return html`<h2>What if</h2>
    <form onSubmit=${run}>
      <fieldset class="row"><legend>Policies</legend>${POLICIES.map((name) => html`<label class="row"><input type="checkbox" checked=${chosen.has(name)} onChange=${() => toggle(name)} /> ${name}</label>`)}</fieldset>
      <div class="row">
        <label>Requests of the last <select value=${minutes} onChange=${(event) => setMinutes(Number(event.target.value))}>${[15, 60, 360, 1440].map((n) => html`<option value=${n}>${n} minutes</option>`)}</select></label>
        <label>Blocks in a pod's cache <input type="number" min="1" value=${blocks} onInput=${(event) => setBlocks(Number(event.target.value))} /></label>
      </div>
      <button class="do" disabled=${state.busy || chosen.size === 0}>${state.busy ? "Simulating …" : "Simulate"}</button>
    </form>
    <${Problem} error=${state.problem} />
    ${state.rows ? html`<${Table} label="Policies" rows=${state.rows} columns=${[
      ["Policy", (row) => row.policy],
      ["Requests", (row) => show(row.requests), { number: true }],
      ["Hit ratio", (row) => `${show(100 * row.hit_ratio)} %`, { number: true }],
      ["Balance", (row) => show(row.balance), { number: true }],
      ["Recomputed", (row) => show(row.recomputed_tokens, "tokens"), { number: true }],
    ]} />` : null}`;
}
