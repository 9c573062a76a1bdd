// Parts that several views use: numbers with units, tables, polling, focus.
import { html } from "htm/preact";
import { useEffect, useRef, useState } from "preact/hooks";

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
export const show = (value, unit = "") => (value === null || value === undefined || value < 0 ? "–" : number.format(value) + (unit && ` ${unit}`));
export const signed = (value) => `${value > 0 ? "+" : value < 0 ? "−" : "±"}${number.format(Math.abs(value))}`;
export function clock(ms) {
  if (!ms) return "–";
  const moment = new Date(ms);
  const day = moment.toDateString() === new Date().toDateString() ? "" : `${moment.toLocaleDateString("en-CA")} `;
  return day + moment.toLocaleTimeString("en-GB");
}
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
  const [state, set] = useState({ data: null, problem: null, at: 0 });
  const latest = useRef(load);
  latest.current = load;
  useEffect(() => {
    let over = false;
    let timer;
    async function turn() {
      if (!document.hidden) {
        try {
          const data = await latest.current();
          if (!over) set({ data, problem: null, at: Date.now() });
        } catch (error) {
          if (!over) set((before) => ({ ...before, problem: error }));
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

// What went wrong, and from when that is which is still shown.
export const Problem = ({ error, at }) => (error ? html`<p class="problem" role="alert">${error.message}${at ? `; shown is what was known at ${clock(at)}` : ""}</p>` : null);

export const Reading = () => html`<p class="note" role="status">reading …</p>`;

// The heading of what was just opened takes the focus, and gives it back to what opened it.
export function Opened({ level = "h3", children }) {
  const place = useRef(null);
  useEffect(() => {
    const opener = document.activeElement;
    place.current.focus();
    return () => (opener?.isConnected ? opener : document.getElementById("main"))?.focus();
  }, []);
  return html`<${level} tabindex="-1" ref=${place}>${children}<//>`;
}

// A number, and how much it is of the most there can be.
export const Bar = ({ share, text }) => html`${text}<span class="bar" style=${{ width: `${100 * Math.max(0, Math.min(1, share))}%` }}></span>`;

// So many rows are drawn until more are asked for: a page with thousands would not keep up with its changes.
const PAGE = 100;

// columns: [title, value(row), {number, wide, by}]; the first is the row's heading, `by` is what it can be ordered by.
export function Table({ label, columns, rows, empty = "nothing yet", tall = false }) {
  const [most, setMost] = useState(PAGE);
  const [order, setOrder] = useState({ at: -1, up: false });
  const by = columns[order.at]?.[2].by;
  const sorted = by ? [...rows].sort((a, b) => (by(a) < by(b) ? -1 : by(a) > by(b) ? 1 : 0) * (order.up ? 1 : -1)) : rows;
  const kind = (options) => (options?.number ? "number" : options?.wide ? "wide" : "");
  const head = ([title, , options], at) => {
    if (!options?.by) return html`<th scope="col" class=${kind(options)}>${title}</th>`;
    const now = order.at === at ? (order.up ? "ascending" : "descending") : null;
    return html`<th scope="col" class=${kind(options)} aria-sort=${now}><button onClick=${() => setOrder({ at, up: now === "descending" })}>${title}<span aria-hidden="true">${now ? (order.up ? " ▴" : " ▾") : ""}</span></button></th>`;
  };
  const cell = (row) => ([, value, options], at) => (at ? html`<td class=${kind(options)}>${value(row)}</td>` : html`<th scope="row" class=${kind(options)}>${value(row)}</th>`);
  return html`<div class=${tall ? "scroll tall" : "scroll"} role="region" aria-label=${label} tabindex="0">
    <table>
      <thead><tr>${columns.map(head)}</tr></thead>
      <tbody>
        ${rows.length === 0 ? html`<tr><td colspan=${columns.length} class="note">${empty}</td></tr>` : null}
        ${sorted.slice(0, most).map((row) => html`<tr key=${row.key}>${columns.map(cell(row))}</tr>`)}
      </tbody>
    </table>
    ${rows.length > most ? html`<p class="more">${show(most)} of ${show(rows.length)} rows <button class="link" onClick=${() => setMost(most + PAGE)}>show ${PAGE} more</button></p>` : null}
  </div>`;
}

export const SINCE = ["-15m", "-1h", "-6h", "-1d", "earliest"];
export const Since = ({ label, value, set, none = "" }) => html`<label>${label} <select value=${value} onChange=${(event) => set(event.target.value)}>${none ? html`<option value="">${none}</option>` : null}${SINCE.map((text) => html`<option value=${text}>${text === "earliest" ? "the log begins" : `${text.slice(1)} ago`}</option>`)}</select></label>`;

export const Figures = ({ figures }) => html`<ul class="figures">${figures.map(([name, value]) => html`<li><b>${value}</b><span>${name}</span></li>`)}</ul>`;
