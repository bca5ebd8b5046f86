// Package admin is a proxy's HTTP side: readiness for the kubelet, metrics for
// the scraper, and an admin server for istioctl and people, in ztunnel's
// forms. It only reads what others know, but for the log level and the order to
// stop.
package admin
