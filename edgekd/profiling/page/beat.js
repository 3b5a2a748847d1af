// A worker of the page that says every second that the page is there: the page itself cannot while it computes.
setInterval(() => fetch('../beat', { method: 'POST' }).catch(() => close()), 1000);
