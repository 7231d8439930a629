"use strict";
// Draws each chart when it is first seen, and shows the one view that the controls above it name.
function draw(root) {
  for (const chart of root.querySelectorAll(".chart:not([data-drawn])")) {
    if (!chart.offsetParent) continue;
    chart.dataset.drawn = "true";
    const spec = JSON.parse(chart.querySelector("script").textContent);
    const options = { mode: "vega-lite", renderer: "svg", actions: false, defaultStyle: false };
    vegaEmbed(chart, spec, options).catch((error) => console.error(error));
  }
}

for (const views of document.querySelectorAll(".views")) {
  const form = views.querySelector(":scope > form");
  if (!form) continue;
  const show = () => {
    const chosen = [...new FormData(form)].sort((a, b) => a[0] - b[0]).map((pair) => pair[1]);
    for (const view of views.querySelectorAll(":scope > .view")) {
      view.hidden = view.dataset.view !== chosen.join(" ");
    }
    draw(views);
    window.dispatchEvent(new Event("resize")); // a chart that was hidden had no width
  };
  form.addEventListener("change", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}
draw(document);
