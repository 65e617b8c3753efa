// Sorting: by what data-value holds; cells that hold nothing stay last either way.
function sort(head) {
  const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
  const text = head.classList.contains("text");
  const before = head.getAttribute("aria-sort");
  const descending = before ? before === "ascending" : !text;
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const key = row => row.cells[column].dataset.value;
  const order = (a, b) => text ? key(a).localeCompare(key(b), "en", { numeric: true }) : key(a) - key(b);
  const rows = [...body.rows].sort((a, b) =>
    (key(a) === "") - (key(b) === "") || (descending ? order(b, a) : order(a, b)));
  body.append(...rows);
}
for (const head of document.querySelectorAll("table.layers th")) {
  head.addEventListener("click", () => sort(head));
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(head); });
}
