package config

import (
	"errors"
	"strconv"
	"strings"
)

// refusals are settings that ztunnel has and that would be dangerous to pass
// over in silence: the operator relies on what they do.
func (l *loader) refusals() {
	refuse := func(name, why string) { l.bad(name, errors.New(why)) }

	switch mode := l.env["PROXY_MODE"]; strings.ToLower(mode) {
	case "", "shared":
	case "dedicated":
		refuse("PROXY_MODE", "dedicated is not supported: ztun-proxy serves the pods that the node agent hands to it")
	default:
		refuse("PROXY_MODE", "the value is neither shared nor dedicated")
	}
	if !l.flag("ENABLE_PROXY", true) {
		refuse("ENABLE_PROXY", "false leaves nothing to do")
	}
	if l.flag("FAKE_CA", false) {
		refuse("FAKE_CA", "there is no built-in CA: ztun control has one for tests and small installations")
	}
	_, path := l.env["LOCAL_XDS_PATH"]
	_, inline := l.env["LOCAL_XDS"]
	switch {
	case path && inline:
		refuse("LOCAL_XDS", "LOCAL_XDS_PATH is set too")
	case path || inline:
		refuse("LOCAL_XDS", "local configuration is not read: ztun control serves a folder of YAML")
	}
	if l.flag("XDS_ON_DEMAND", false) {
		if l.cfg.DNS {
			refuse("XDS_ON_DEMAND", "cannot be used with DNS capture, which is on unless ISTIO_META_DNS_CAPTURE is false")
		}
		l.note("XDS_ON_DEMAND is not used: ztun-proxy subscribes to everything")
	}
	if l.flag("UNSTABLE_ENABLE_SOCKS5", false) {
		refuse("UNSTABLE_ENABLE_SOCKS5", "there is no SOCKS5 listener")
	}
}

// unused are settings that change nothing here. Their values are checked all
// the same, so that a typing error is found where ztunnel finds it.
func (l *loader) unused() {
	if mark, ok := l.env["PACKET_MARK"]; ok {
		if _, err := strconv.ParseUint(mark, 10, 32); err != nil {
			l.bad("PACKET_MARK", errors.New("the value is not a number of 32 bits"))
		}
		l.note("PACKET_MARK is not used: the proxy has no socket in any pod")
	}
	if _, ok := l.env["INPOD_PORT_REUSE"]; ok {
		l.flag("INPOD_PORT_REUSE", true)
		l.note("INPOD_PORT_REUSE is not used: the proxy has no socket in any pod")
	}
	if _, ok := l.env["ENABLE_ORIG_SRC"]; ok && !l.flag("ENABLE_ORIG_SRC", true) {
		l.note("ENABLE_ORIG_SRC=false is not used: applications always see the client's own address")
	}
	if _, ok := l.env["LOCALHOST_APP_TUNNEL"]; ok {
		l.flag("LOCALHOST_APP_TUNNEL", true)
		l.note("LOCALHOST_APP_TUNNEL is not used: application tunnels are not supported yet")
	}
	if _, ok := l.env["PREFERED_SERVICE_NAMESPACE"]; ok {
		l.note("PREFERED_SERVICE_NAMESPACE is not used yet")
	}
	if _, ok := l.env["PROXY_WORKLOAD_INFO"]; ok {
		l.note("PROXY_WORKLOAD_INFO is not used: it belongs to PROXY_MODE=dedicated")
	}
}
