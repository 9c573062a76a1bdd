// Sliders over the time that the log reaches back: one past moment beside now, or two.
import { html } from "htm/preact";
import { useState } from "preact/hooks";
import { call } from "./api.js";
import { clock, Problem, age } from "./parts.js";

// A moment is kept in ms since the epoch; this is how the command line takes it.
export const textOf = (ms) => `@${(ms / 1000).toFixed(3)}`;

export function Moments({ moments, set }) {
  const [span, setSpan] = useState(null);
  const [problem, setProblem] = useState(null);
  async function toggle(event) {
    if (!event.target.checked) {
      setSpan(null);
      set([]);
      return;
    }
    try {
      const found = await call("span");
      if (!found.first_ms) throw new Error("the log is empty");
      setSpan(found);
      setProblem(null);
      set([Math.max(found.first_ms, found.now_ms - 600000)]);
    } catch (error) {
      setProblem(error);
    }
  }
  const move = (number) => (event) => {
    const next = [...moments];
    next[number] = Number(event.target.value);
    set(next.sort((a, b) => a - b));
  };
  const slider = (number, label) => html`<label>${label} <output>${clock(moments[number])}, ${age(span.now_ms - moments[number])} ago</output>
    <input type="range" name=${`moment-${number}`} min=${Math.ceil(span.first_ms)} max=${Math.floor(span.now_ms)} step="1" value=${moments[number]} onChange=${move(number)} aria-valuetext=${clock(moments[number])} /></label>`;
  return html`<fieldset><legend>Time</legend>
    <label class="box"><input type="checkbox" name="past" checked=${span !== null} onChange=${toggle} /> beside a past moment</label>
    <${Problem} error=${problem} />
    ${span ? html`${slider(0, "Then")}
      <label class="box"><input type="checkbox" name="second" checked=${moments.length > 1} onChange=${(event) => set(event.target.checked ? [moments[0], span.now_ms] : moments.slice(0, 1))} /> and a second one</label>
      ${moments.length > 1 ? slider(1, "Later") : null}
      <small>The log begins at ${clock(span.first_ms)}.</small>` : null}
  </fieldset>`;
}
