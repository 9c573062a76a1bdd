// Parts that several views use: numbers with units, tables, polling.
import { html } from "htm/preact";
import { useEffect, useRef, useState } from "preact/hooks";

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
export const show = (value, unit = "") => (value === null || value === undefined || value < 0 ? "–" : number.format(value) + (unit && ` ${unit}`));
export const signed = (value) => `${value > 0 ? "+" : value < 0 ? "−" : "±"}${number.format(Math.abs(value))}`;
export const clock = (ms) => (ms ? new Date(ms).toLocaleTimeString("en-GB") : "–");
export function age(ms) {
  if (ms === null || ms === undefined || ms < 0) return "never";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 120000) return `${number.format(ms / 1000)} s`;
  return `${number.format(ms / 60000)} min`;
}
export function ranges(numbers) {
  const parts = [];
  for (const n of numbers) {
    const last = parts[parts.length - 1];
    if (last && n === last[1] + 1) last[1] = n;
    else parts.push([n, n]);
  }
  return parts.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ") || "–";
}

// Calls `load` now and every `seconds`, unless the tab is hidden; a failure keeps what was there and is shown.
export function usePoll(load, seconds, keys) {
  const [state, set] = useState({ data: null, problem: null });
  const latest = useRef(load);
  latest.current = load;
  useEffect(() => {
    let over = false;
    let timer;
    async function turn() {
      if (!document.hidden) {
        try {
          const data = await latest.current();
          if (!over) set({ data, problem: null });
        } catch (error) {
          if (!over) set((before) => ({ data: before.data, problem: error }));
        }
      }
      if (!over && seconds) timer = setTimeout(turn, seconds * 1000);
    }
    turn();
    return () => {
      over = true;
      clearTimeout(timer);
    };
  }, keys);
  return state;
}

export const Problem = ({ error }) => (error ? html`<p class="problem" role="alert">${error.message}</p>` : null);

// columns: [title, value(row), {number, wide}]; the row's first column is its heading.
export function Table({ label, columns, rows, empty = "nothing yet", tall = false }) {
  return html`<div class=${tall ? "scroll tall" : "scroll"} role="region" aria-label=${label} tabindex="0">
    <table>
      <thead><tr>${columns.map(([title, , options]) => html`<th scope="col" class=${options?.number ? "number" : ""}>${title}</th>`)}</tr></thead>
      <tbody>
        ${rows.length === 0 ? html`<tr><td colspan=${columns.length} class="note">${empty}</td></tr>` : null}
        ${rows.map((row) => html`<tr key=${row.key}>${columns.map(([, value, options]) => html`<td class=${options?.number ? "number" : options?.wide ? "wide" : ""}>${value(row)}</td>`)}</tr>`)}
      </tbody>
    </table>
  </div>`;
}

export const SINCE = ["-15m", "-1h", "-6h", "-1d", "earliest"];
export const Since = ({ label, value, set, none = "" }) => html`<label>${label} <select value=${value} onChange=${(event) => set(event.target.value)}>${none ? html`<option value="">${none}</option>` : null}${SINCE.map((text) => html`<option value=${text}>${text === "earliest" ? "the log begins" : `${text.slice(1)} ago`}</option>`)}</select></label>`;

export const Figures = ({ figures }) => html`<ul class="figures">${figures.map(([name, value]) => html`<li><b>${value}</b><span>${name}</span></li>`)}</ul>`;
