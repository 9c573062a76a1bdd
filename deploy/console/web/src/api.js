// Requests to the server: the token comes from the address once and stays in this tab.
const kept = window.sessionStorage;

export function takeToken() {
  const given = new URLSearchParams(window.location.hash.slice(1)).get("token");
  if (given) {
    kept.setItem("token", given);
    window.history.replaceState(null, "", window.location.pathname + "#fleet");
  }
}

export function setToken(name, value) {
  value ? kept.setItem(name, value) : kept.removeItem(name);
}

export async function call(path, body) {
  const headers = {};
  if (kept.getItem("token")) headers.authorization = `Bearer ${kept.getItem("token")}`;
  if (kept.getItem("scorer")) headers["x-scorer-token"] = kept.getItem("scorer");
  if (kept.getItem("salt")) headers["x-cache-salt"] = kept.getItem("salt");
  const answer = await fetch(`api/${path}`, body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) });
  let told;
  try {
    told = await answer.json();
  } catch {
    told = { error: `the console answered ${answer.status}` };
  }
  if (!answer.ok) {
    const error = new Error(told.error || `the console answered ${answer.status}`);
    error.status = answer.status;
    throw error;
  }
  return told;
}

export const query = (path, fields) => call(`${path}?${new URLSearchParams(fields)}`);
