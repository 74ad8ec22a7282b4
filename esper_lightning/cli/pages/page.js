// Shows the values of each line at the place of the pointer, below the chart.
for (const chart of document.querySelectorAll("svg[data-lines]")) {
  const lines = JSON.parse(chart.dataset.lines);
  const [low, high, left, right] = JSON.parse(chart.dataset.x);
  const cursor = chart.querySelector(".cursor");
  const values = chart.parentElement.querySelector(".values");
  const show = (event) => {
    const box = chart.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
    const wanted = low + ((place - left) / (right - left)) * (high - low);
    let at = null;
    const texts = [];
    for (const line of lines) {
      let nearest = -1;
      line.x.forEach((x, k) => {
        if (nearest < 0 || Math.abs(x - wanted) < Math.abs(line.x[nearest] - wanted)) nearest = k;
      });
      if (nearest < 0) continue;
      if (at === null) at = line.x[nearest];
      texts.push((line.name ? line.name + " " : "") + line.y[nearest]);
    }
    if (at === null) return;
    const x = left + ((at - low) / (high - low)) * (right - left);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    values.textContent = at.toLocaleString("en") + " : " + texts.join(", ");
  };
  chart.addEventListener("pointermove", show);
  chart.addEventListener("pointerdown", show);
}
