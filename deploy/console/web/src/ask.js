// Ask: a prompt, a chat or token ids; the score per pod, block by block, now and as of past moments.
import { html } from "htm/preact";
import { useEffect, useState } from "preact/hooks";
import { call, query } from "./api.js";
import { Blocks, Costs, Scores } from "./answer.js";
import { Moments, textOf } from "./moments.js";
import { clock, Problem, show, signed, Table, usePoll } from "./parts.js";

function bodyOf(text, model) {
  const trimmed = text.trim();
  let body = { prompt: text };
  if (trimmed.startsWith("{") || trimmed.startsWith("[")) {
    const read = JSON.parse(trimmed);
    body = !Array.isArray(read) ? read : typeof read[0] === "number" ? { tokens: read } : { messages: read };
  }
  return { ...body, model: model || body.model };
}

// What another view hands over to be asked here.
export const handed = { text: "" };

const NOTHING = { problem: null, now: null, past: [] };

export function Ask() {
  const [model, setModel] = useState("");
  const [text, setText] = useState(handed.text);
  useEffect(() => {
    handed.text = "";
  }, []);
  const [moments, setMoments] = useState([]);
  const [busy, setBusy] = useState(false);
  const [state, set] = useState(NOTHING);
  async function ask(event) {
    event.preventDefault();
    setBusy(true);
    try {
      const body = bodyOf(text, model);
      if (text && sessionStorage.getItem("salt") && !body.cache_salt) body.cache_salt = sessionStorage.getItem("salt");
      const now = await call("ask", body);
      const past = [];
      for (const at of moments) past.push({ at, answer: await call("ask", { ...body, at: textOf(at) }) });
      set({ problem: null, now, past });
    } catch (problem) {
      set({ ...NOTHING, problem });
    }
    setBusy(false);
  }
  const { now, past } = state;
  const { data: picture } = usePoll(() => call("picture"), 0, []);
  const models = picture ? [...new Set(picture.pods.map((pod) => pod.model).filter(Boolean))].sort() : [];
  const newer = past[1] ? { title: clock(past[1].at), answer: past[1].answer } : now && { title: "now", answer: { scores: now.score.scores, blocks: now.explain ? now.explain.blocks : [] } };
  return html`<h2>Ask</h2>
    <form onSubmit=${ask}>
      <label>Model <input name="model" list="models" placeholder=${models[0] || ""} value=${model} onInput=${(event) => setModel(event.target.value)} /><small>as clients spell it; a request body may name it itself</small></label>
      <datalist id="models">${models.map((name) => html`<option value=${name}></option>`)}</datalist>
      <label>Prompt <textarea name="prompt" value=${text} onInput=${(event) => setText(event.target.value)}></textarea><small>text, a list of chat messages, a list of token ids, or a request body as JSON</small></label>
      <${Moments} moments=${moments} set=${setMoments} />
      <button class="do" disabled=${busy}>${busy ? "Asking …" : "Ask"}</button>
    </form>
    <${Problem} error=${state.problem} />
    <div class="beside">
      ${now ? html`<${Answer} title="Now" answer=${{ scores: now.score.scores, ...(now.explain || {}) }} note=${noteOf(now.score)} />` : null}
      ${past.map(({ at, answer }) => html`<${Answer} key=${at} title=${`As of ${clock(at)}`} answer=${answer} note="from the log, as kvatlas at tells it" />`)}
    </div>
    ${now ? html`<${Costs} costs=${now.costs} />` : null}
    ${past.length ? html`<${Differences} older=${{ title: clock(past[0].at), answer: past[0].answer }} newer=${newer} />
      <${Fleet} key=${moments.join()} first=${moments[0]} second=${moments[1]} />` : null}`;
}

function noteOf(score) {
  const parts = [`${show(score.prompt_tokens)} tokens, ${show(score.blocks)} blocks of ${score.block_size_tokens}`];
  if (score.freshness && score.freshness.partial) parts.push("partial: some partitions did not answer");
  if (score.freshness && score.freshness.standby) parts.push("answered by a standby");
  return parts.join("; ");
}

const Answer = ({ title, answer, note }) => html`<section aria-label=${title}><h3>${title}</h3>
  <p class="note">${note}</p>
  <${Scores} title=${title} scores=${answer.scores} walks=${answer.walks || {}} />
  ${answer.blocks ? html`<${Blocks} blocks=${answer.blocks} />` : html`<p class="note">Block by block needs the role explain.</p>`}</section>`;

const holds = (blocks, pod) => new Set(blocks.filter((block) => block.holders.some((holder) => holder.pod === pod && holder.state !== "dead")).map((block) => block.key));

function Differences({ older, newer }) {
  const [then, now] = [older.answer, newer.answer];
  const pods = [...new Set([...Object.keys(then.scores), ...Object.keys(now.scores)])].sort();
  const rows = pods.map((pod) => {
    const [was, is] = [holds(then.blocks, pod), holds(now.blocks, pod)];
    return { key: pod, pod, then: then.scores[pod]?.matched_tokens || 0, now: now.scores[pod]?.matched_tokens || 0, gained: [...is].filter((key) => !was.has(key)).length, lost: [...was].filter((key) => !is.has(key)).length };
  });
  return html`<h3>From ${older.title} to ${newer.title}</h3>
    <${Table} label="Differences" rows=${rows} empty="no pod held it at either moment" columns=${[
      ["Pod", (row) => row.pod],
      ["Tokens then", (row) => show(row.then), { number: true }],
      ["Tokens later", (row) => show(row.now), { number: true }],
      ["Change", (row) => signed(row.now - row.then), { number: true }],
      ["Blocks gained", (row) => show(row.gained), { number: true }],
      ["Blocks lost", (row) => show(row.lost), { number: true }],
    ]} />`;
}

function Fleet({ first, second }) {
  const [state, set] = useState({ busy: false, rows: null, problem: null });
  async function look() {
    set({ busy: true, rows: null, problem: null });
    try {
      const answer = await query("diff", { first: textOf(first), second: second ? textOf(second) : "latest" });
      set({ busy: false, rows: answer.pods.map((row) => ({ ...row, key: row.pod })), problem: null });
    } catch (problem) {
      set({ busy: false, rows: null, problem });
    }
  }
  return html`<p><button class="do" disabled=${state.busy} onClick=${look}>${state.busy ? "Reading the log …" : "What changed on the pods meanwhile"}</button></p>
    <${Problem} error=${state.problem} />
    ${state.rows ? html`<${Table} label="Changes" rows=${state.rows} columns=${[
      ["Pod", (row) => row.pod],
      ["Blocks added", (row) => show(row.added), { number: true }],
      ["Blocks removed", (row) => show(row.removed), { number: true }],
      ["Messages", (row) => show(row.messages), { number: true }],
      ["Lost", (row) => show(row.lost), { number: true }],
      ["Epoch", (row) => (row.epoch_raised ? "raised" : "same")],
      ["State", (row) => row.state || "–"],
    ]} />` : null}`;
}
