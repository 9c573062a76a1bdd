// An answer of the scorer: scores, blocks in colours, and what the picker reckons.
import { html } from "htm/preact";
import { show, Table } from "./parts.js";

const TIERS = ["gpu", "cpu", "disk", "shared"];
const WITHOUT_CREDIT = new Set(["dead", "gone", "unknown-pod", "other-model", "adapters", "assumed"]);
const SHOWN = 2000;

export function Scores({ title, scores, walks }) {
  const names = [...new Set([...Object.keys(scores), ...Object.keys(walks)])];
  const none = { score: 0, matched_tokens: 0, matched_blocks: 0 };
  const rows = names.map((pod) => ({ key: pod, pod, ...(scores[pod] || none) })).sort((a, b) => b.score - a.score || (a.pod < b.pod ? -1 : 1));
  return html`<${Table} label=${`Scores ${title}`} rows=${rows} empty="no pod holds the first block" columns=${[
    ["Pod", (row) => row.pod],
    ["Score", (row) => show(row.score), { number: true }],
    ["Tokens", (row) => show(row.matched_tokens), { number: true }],
    ["Blocks", (row) => show(row.matched_blocks), { number: true }],
    ["Suspect", (row) => show(row.suspect_blocks || 0), { number: true }],
    ["Why it ends there", (row) => walks[row.pod]?.reason ?? walks[row.pod] ?? "–", { wide: true }],
  ]} />`;
}

export function Blocks({ blocks }) {
  const pods = [...new Set(blocks.flatMap((block) => block.holders.map((holder) => holder.pod)))].sort();
  const shown = blocks.slice(0, SHOWN);
  if (pods.length === 0) return null;
  return html`<ul class="legend" aria-label="Colours">${[...TIERS, "suspect", "speculative"].map((name) => html`<li><span class=${`cell ${name}`}></span>${name}</li>`)}<li><span class="cell"></span>not held</li></ul>
    ${pods.map((pod) => {
      const cells = shown.map((block) => best(block.holders.filter((holder) => holder.pod === pod)));
      const held = cells.filter(Boolean).length;
      return html`<div key=${pod}><b>${pod}</b> <span class="note">${show(held)} of ${show(shown.length)} blocks</span>
        <div class="strip" role="img" aria-label=${`${pod} holds ${held} of ${shown.length} blocks`}>${cells.map((name, at) => html`<span class=${`cell ${name}`} title=${`block ${at}: ${name || "not held"}`}></span>`)}</div></div>`;
    })}
    ${blocks.length > shown.length ? html`<p class="note">the first ${shown.length} of ${blocks.length} blocks</p>` : null}`;
}

function best(holders) {
  const counted = holders.filter((holder) => !WITHOUT_CREDIT.has(holder.state));
  if (counted.length === 0) return "";
  const tier = TIERS.find((name) => counted.some((holder) => holder.tier === name));
  const one = counted.find((holder) => holder.tier === tier) || counted[0];
  return one.state === "suspect" || one.state === "speculative" ? one.state : tier || "gpu";
}

const RULES = { cost: "the least cost decides", session: "costs are near, and the session is there", cold: "nobody holds it: the pod that got such a prompt longest ago", burst: "a burst of this prefix is held together", hot: "a pod with a long queue was left out", drawn: "drawn among near costs", saturated: "all pods are past their limits: the request would be refused", none: "no pod serves this model" };

export function Costs({ costs }) {
  const rows = costs.pods.map((row) => ({ ...row, key: row.pod }));
  const tokens = (name) => [(row) => show(row[name]), { number: true }];
  return html`<h3>What the picker reckons</h3>
    <p class="note">Cost of the prompt at each pod, in tokens, its choice first; ${RULES[costs.rule] || costs.rule}.${costs.saturated ? ` ${costs.saturated} pods are past their limits.` : ""}</p>
    <${Table} label="Costs" rows=${rows} empty="no pod takes part" columns=${[
      ["Pod", (row) => row.pod],
      ["Cached", ...tokens("held_tokens")],
      ["To compute", ...tokens("compute")],
      ["Queue", ...tokens("queued")],
      ["Decoding", ...tokens("decode")],
      ["Full cache", ...tokens("full")],
      ["Cost", ...tokens("total")],
      ["Session", (row) => (row.session ? "here" : "–")],
      ["Load", (row) => (row.load_known ? `${show(row.requests)} requests, ${show(100 * row.cache_usage)} % of the cache` : row.requests ? `${show(row.requests)} requests given` : "not reported")],
    ]} />`;
}
